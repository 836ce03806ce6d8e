"""What `gspn-dit export` does: a run becomes a folder that `GSPNDiTPipeline.from_pretrained` loads anywhere.

The folder is a saved :class:`~gspn_dit.inference.pipeline.GSPNDiTPipeline`: averaged weights, VAE, scheduler, class
names and the run's sampling defaults, with a model card and its grid of samples. Wherever a model is named, the folder
can be named; diffusers' own `DiffusionPipeline` does not know the class.

A run of `distill-t2i` becomes a folder that `AttentionReplacement.from_pretrained` loads.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("export", prog="python -m gspn_dit.inference.export")
    raise SystemExit

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from gspn_dit.devices import choose_device
from gspn_dit.inference.grid import draw_grid
from gspn_dit.inference.loading import find_checkpoint, load_pipeline
from gspn_dit.inference.model_card import GRID_FILE, model_card
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.inference.replacements import export_replacement, is_replacement
from gspn_dit.options import require
from gspn_dit.storage.files import new_folder, require_new
from gspn_dit.storage.run_folder import Checkpoint

if TYPE_CHECKING:
    from gspn_dit.commands import ExportOptions

GRID_IMAGES = 16


def main(options: ExportOptions) -> None:
    """Write a run's newest checkpoint as a saved pipeline."""
    out = Path(options.out)
    require_new(out)
    checkpoint = find_checkpoint(options.model)
    if checkpoint is not None and is_replacement(checkpoint):
        require(options.vae is None, "vae", options.vae, "none: replaced layers have no VAE")
        export_replacement(checkpoint, out)
        print(f"{options.model} as replaced layers, to be mounted on their base model: {out}")
        return
    pipeline = load_pipeline(checkpoint or options.model, options.vae)
    require_new(out, pipeline.transformer.get_memory_footprint() + pipeline.vae.get_memory_footprint())
    with new_folder(out) as folder:
        pipeline.save_pretrained(folder)
        for path in folder.rglob("*.json"):
            _forget_origin(path)
        save_samples(pipeline, checkpoint, folder / GRID_FILE)
        (folder / "README.md").write_text(model_card(pipeline, checkpoint))
    print(f"{options.model} as a pipeline: {out}")


def save_samples(pipe: GSPNDiTPipeline, checkpoint: Checkpoint | None, path: Path) -> None:
    """The grid that training drew at a checkpoint, or one that is drawn now."""
    if checkpoint and (run := checkpoint.run) and (drawn := run.samples(checkpoint.step)).is_file():
        shutil.copyfile(drawn, path)
        return
    pipe.set_progress_bar_config(desc=path.name, disable=None)
    draw_grid(pipe.to(choose_device()), path, count=GRID_IMAGES, seed=0)


def _forget_origin(path: Path) -> None:
    """diffusers notes in each config where on this machine it was loaded from: nobody else's business."""
    values = json.loads(path.read_text())
    if values.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(values, indent=2) + "\n")
