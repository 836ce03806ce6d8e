"""Turn a run into a saved diffusers pipeline: `python -m gspn_dit.export RUN FOLDER`.

The folder is a saved :class:`~gspn_dit.pipeline.GSPNDiTPipeline`: averaged weights, VAE, scheduler, class names and the
run's sampling defaults, with a model card and its grid of samples. `sample.py --model FOLDER` takes it, and
`GSPNDiTPipeline.from_pretrained(FOLDER)`; diffusers' own `DiffusionPipeline` does not know the class.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gspn_dit.devices import choose_device
from gspn_dit.diffusion import image_generator
from gspn_dit.errors import InputError
from gspn_dit.model_card import GRID_FILE, model_card
from gspn_dit.options import command
from gspn_dit.pictures import save_grid
from gspn_dit.pipeline import GSPNDiTPipeline, find_checkpoint, load_pipeline

GRID_IMAGES = 16


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
    """Write a run's newest checkpoint as a saved pipeline."""
    out = Path(options.out)
    if out.exists():
        raise InputError(f"out={options.out!r}: exists already; remove it or name another folder")
    checkpoint = find_checkpoint(options.model)
    pipeline = load_pipeline(checkpoint or options.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / out.name
        pipeline.save_pretrained(folder)
        for path in folder.rglob("*.json"):
            _forget_origin(path)
        save_samples(pipeline, checkpoint, folder / GRID_FILE)
        (folder / "README.md").write_text(model_card(pipeline, checkpoint))
        folder.rename(out)
    print(f"{options.model} as a pipeline: {out}")


def save_samples(pipe: GSPNDiTPipeline, checkpoint: Path | None, path: Path) -> None:
    """The grid that training drew at a checkpoint, or one that is drawn now."""
    drawn = checkpoint.parents[1] / "samples" / f"{checkpoint.name}.png" if checkpoint else None
    if drawn and drawn.is_file():
        shutil.copyfile(drawn, path)
        return
    classes = pipe.transformer.config.num_classes
    labels = [i * classes // GRID_IMAGES if classes > GRID_IMAGES else i % classes for i in range(GRID_IMAGES)]
    generators = [image_generator(0, i) for i in range(GRID_IMAGES)]
    pipe.set_progress_bar_config(desc=path.name)
    save_grid(pipe.to(choose_device())(labels, generator=generators, output_type="uint8").images, path)


def _forget_origin(path: Path) -> None:
    """diffusers notes in each config where on this machine it was loaded from: nobody else's business."""
    values = json.loads(path.read_text())
    if values.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    command(main, Options, prog="python -m gspn_dit.export", positional=("model", "out"))
