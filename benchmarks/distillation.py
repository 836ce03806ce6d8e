"""What can take the place of attention: layers of several kinds, taught alike by one text-to-image model of scenes.

`python -m benchmarks.distillation --teacher FOLDER --data STORE --out FOLDER` teaches every mixer with every seed by
the project's own distillation, in the same steps on the same latents in the same order, and judges each beside the
teacher: drawn at the size that the teacher knows, at larger ones from noise, and at these by a ladder. It writes

    settings.json                  what it was begun with
    <mixer>/seed-<k>/layerwise/    the run of its first stage
    <mixer>/seed-<k>/run/          the run of its second stage
    <mixer>/seed-<k>/pictures/     the first pictures of every view
    <mixer>/seed-<k>/result.json   once it is judged
    report.md, losses.png, pictures-<view>.png   of what is finished

and is safe to stop at any moment: run it again and it goes on. Several processes may share the folder, each with other
cells. The teacher is a folder that `gspn-dit export` made of a run of `gspn-dit train-t2i` on `scenes`, the store what
`gspn-dit encode-t2i --base FOLDER --data scenes` made.
"""

from __future__ import annotations

from benchmarks.commands import DistillationOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("distillation"))

from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import finish_all, say_how_far
from benchmarks.distillation_cell import Cell
from benchmarks.distillation_report import write_report
from gspn_dit.data.latent_store import is_latent_store
from gspn_dit.inference.text_to_image import find_text_to_image
from gspn_dit.ops.registry import require_kernels
from gspn_dit.options import require
from gspn_dit.storage.files import begin_or_continue

OF_A_FOLDER = (  # mixers and seeds may be added to it
    "layerwise_steps",
    "steps",
    "batch_size",
    "learning_rate",
    "chunk",
    "num_inference_steps",
    "guidance_scale",
    "images",
)


def settings(options: Options) -> dict[str, Any]:
    """What the figures of one folder have in common."""
    return {key: getattr(options, key) for key in OF_A_FOLDER}


def main(options: Options) -> None:
    """Teach and judge every mixer with every seed, and report what is finished."""
    find_text_to_image(options.teacher)
    require(is_latent_store(options.data), "data", options.data, "a store that `gspn-dit encode-t2i` made")
    require_kernels(torch.device("cpu"))  # raises where the reference operator would stand for want of it
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    begin_or_continue(out / "settings.json", settings(options), "out")
    finish_all(cells(options))
    print(write_report(out, options.mixers, settings(options)))
    say_how_far(cells(options), out)


def cells(options: Options) -> list[Cell]:
    """One seed of every mixer before a second of any."""
    return [
        Cell(Path(options.out) / mixer / f"seed-{seed}", mixer, seed, options)
        for seed in range(options.seeds)
        for mixer in options.mixers
    ]
