"""Classification at equal cost: one design with each mixer, trained alike on pictures of clothes of 28 pixels.

`python -m benchmarks.classification --data FOLDER --out FOLDER` trains every mixer with every seed by the project's own
training, for the same steps on the same pictures in the same order, altered alike; every step has them at a size of its
own, around 28 pixels. Test pictures are shown at these sizes, and at half and twice 28 pixels. It writes

    settings.json                  what it was begun with
    <mixer>/seed-<k>/run/          the run of a training
    <mixer>/seed-<k>/result.json   once it is judged
    report.md, losses.png          of what is finished

and is safe to stop at any moment: run it again and it goes on. Several processes may share the folder, each with other
cells. With `--speed`, by itself on an idle machine, it measures how many images a second are trained on.

The baselines' feed-forward is made narrower until their multiply-accumulates are ours.
"""

from __future__ import annotations

from benchmarks.commands import ClassificationOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("classification"))

import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import finish_all, say_how_far
from benchmarks.classification_cell import Cell, cell_config, measure_speed
from benchmarks.classification_report import write_report
from benchmarks.machine import machine
from benchmarks.result_files import noted
from gspn_dit.data.idx import is_idx_folder
from gspn_dit.ops.registry import require_kernels
from gspn_dit.options import require
from gspn_dit.storage.files import begin_or_continue, write_json


def settings(options: Options) -> dict[str, Any]:
    """What the figures of one folder have in common; mixers and seeds may be added to it."""
    numbers = {key: getattr(options, key) for key in ("steps", "batch_size", "learning_rate")}
    return {**numbers, "sizes": None if options.sizes is None else list(options.sizes)}


def main(options: Options) -> None:
    """Train every mixer with every seed, or measure their speed, and report what is finished."""
    require(is_idx_folder(options.data), "data", options.data, "a folder of idx files")
    require_kernels(torch.device("cpu"))  # raises where the reference operator would be timed for want of it
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    begin_or_continue(out / "settings.json", settings(options), "out")
    if options.speed:
        configs = {mixer: cell_config(out / mixer / "speed", mixer, 0, options) for mixer in options.mixers}
        speed = {"machine": machine(), "images": measure_speed(configs)}
        write_json(out / "speed.json", noted({**speed, "load": os.getloadavg()[0], "cores": os.cpu_count()}))
    else:
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
