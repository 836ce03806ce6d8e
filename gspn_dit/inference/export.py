"""Turn a run into a saved diffusers pipeline: `python -m gspn_dit.inference.export RUN FOLDER`.

The folder is a saved :class:`~gspn_dit.inference.pipeline.GSPNDiTPipeline`: averaged weights, VAE, scheduler, class
names and the run's sampling defaults, with a model card and its grid of samples. `sample.py --model FOLDER` takes it,
and `GSPNDiTPipeline.from_pretrained(FOLDER)`; diffusers' own `DiffusionPipeline` does not know the class.
"""

from __future__ import annotations

from gspn_dit.commands import ExportOptions as Options
from gspn_dit.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("export", prog="python -m gspn_dit.inference.export"))

import json
import shutil
from pathlib import Path

from gspn_dit.devices import choose_device
from gspn_dit.inference.drawing import draw_grid
from gspn_dit.inference.model_card import GRID_FILE, model_card
from gspn_dit.inference.pipeline import GSPNDiTPipeline, find_checkpoint, load_pipeline
from gspn_dit.storage.files import new_folder, require_new

GRID_IMAGES = 16


def main(options: Options) -> None:
    """Write a run's newest checkpoint as a saved pipeline."""
    out = Path(options.out)
    require_new(out)
    checkpoint = find_checkpoint(options.model)
    pipeline = load_pipeline(checkpoint or options.model, options.vae)
    require_new(out, pipeline.transformer.get_memory_footprint() + pipeline.vae.get_memory_footprint())
    with new_folder(out) as folder:
        pipeline.save_pretrained(folder)
        for path in folder.rglob("*.json"):
            _forget_origin(path)
        save_samples(pipeline, checkpoint, folder / GRID_FILE)
        (folder / "README.md").write_text(model_card(pipeline, checkpoint))
    print(f"{options.model} as a pipeline: {out}")


def save_samples(pipe: GSPNDiTPipeline, checkpoint: Path | None, path: Path) -> None:
    """The grid that training drew at a checkpoint, or one that is drawn now."""
    drawn = checkpoint.parents[1] / "samples" / f"{checkpoint.name}.png" if checkpoint else None
    if drawn and drawn.is_file():
        shutil.copyfile(drawn, path)
        return
    pipe.set_progress_bar_config(desc=path.name, disable=None)
    draw_grid(pipe.to(choose_device()), path, count=GRID_IMAGES, seed=0)


def _forget_origin(path: Path) -> None:
    """diffusers notes in each config where on this machine it was loaded from: nobody else's business."""
    values = json.loads(path.read_text())
    if values.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(values, indent=2) + "\n")
