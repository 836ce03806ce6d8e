"""Turn a run into a folder that diffusers loads: `python -m gspn_dit.export --model RUN --out FOLDER`.

The folder is a saved :class:`~gspn_dit.pipeline.GSPNDiTPipeline`: averaged weights, VAE, scheduler, class names and the
run's sampling defaults. `sample.py --model FOLDER` takes it, and `GSPNDiTPipeline.from_pretrained(FOLDER)`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gspn_dit.errors import InputError
from gspn_dit.options import command
from gspn_dit.pipeline import load_pipeline


@dataclass
class Options:
    """What to export, and where to.

    Args:
        model: A run, or one checkpoint of it.
        out: The folder to write; it must not exist yet.
    """

    model: str
    out: str


def main(options: Options) -> None:
    """Write a run's newest checkpoint as a pipeline folder that diffusers loads."""
    out = Path(options.out)
    if out.exists():
        raise InputError(f"out={options.out!r}: exists already; remove it or name another folder")
    pipeline = load_pipeline(options.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / out.name
        pipeline.save_pretrained(folder)
        for path in folder.rglob("*.json"):
            _forget_origin(path)
        folder.rename(out)
    print(f"{options.model} as a pipeline: {out}")


def _forget_origin(path: Path) -> None:
    """diffusers notes in each config where on this machine it was loaded from: nobody else's business."""
    values = json.loads(path.read_text())
    if values.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    command(main, Options, prog="python -m gspn_dit.export")
