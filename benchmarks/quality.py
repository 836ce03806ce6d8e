"""Quality at the same budget: families and mixers, trained alike on digits, photographs and a task that needs reach.

`python -m benchmarks.quality --preset gpu --out FOLDER` trains every model on every data set with every seed: the same
width, depth, samples in the same order with the same noise and times, steps, optimiser and EMA. The steps are those of
`gspn-dit train`. It writes

    settings.json                     what it was begun with
    <data>/<model>/seed-<k>/          result.json and samples.png once finished, checkpoints/ before
    report.md, losses.png, samples-<data>.png      of what is finished

and is safe to stop at any moment: run it again and it goes on, on the CPU to the same figures bit for bit. With
`--time-budget 500` it stops by itself. A model is a family, or a family and its options, as in
`gspn-dit+mixer=linear` or `gspn-dit+chunk=8+global_layers=4`: an ablation is a longer list of models.
"""

from __future__ import annotations

from benchmarks.commands import QualityOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("quality"))

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.deadline import GO_ON, Deadline
from benchmarks.quality_cell import TIMES, Cell
from benchmarks.quality_data import TASKS
from benchmarks.quality_model import make_model
from benchmarks.quality_report import write_report
from gspn_dit.devices import choose_device
from gspn_dit.ops.registry import require_kernels
from gspn_dit.precision import choose_precision
from gspn_dit.storage.files import begin_or_continue
from gspn_dit.training.step import NonFiniteLoss
from gspn_dit.training.stop_request import StopRequest


def settings(options: Options) -> dict[str, Any]:
    """What the figures of one folder have in common; data sets, models and seeds may be added to it."""
    keys = (
        "width",
        "depth",
        "steps",
        "batch_size",
        "learning_rate",
        "ema_decay",
        "mixed_precision",
        "held_out",
        "samples",
        "inference_steps",
        "compile",
    )
    return {key: getattr(options, key) for key in keys}


def main(options: Options) -> None:
    """Train every model on every data set with every seed, as far as the time goes, and report what is finished.

    A model whose loss is not finite is left; this goes on with the others, and ends with an error.
    """
    deadline = Deadline(options.time_budget)
    device = choose_device(options.device)
    options = replace(options, mixed_precision=choose_precision(options.mixed_precision, device).name)
    require_kernels(device)  # raises where the reference operator would be timed for want of it
    tasks = {name: TASKS[name]() for name in options.data}
    for task in tasks.values():
        for spec in options.models:
            with torch.device("meta"):
                make_model(spec, task, options)  # refuse what cannot be before anything is trained
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    begin_or_continue(out / "settings.json", settings(options), "out")
    if device.index is not None:
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=options.mixed_precision)
    stopped, failed = False, []
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stop.training = True
        for seed, data, spec in cells(options):
            folder = out / data / spec / f"seed-{seed}"
            if (folder / "result.json").exists():
                continue
            try:
                cell = Cell(folder, tasks[data], spec, seed, options, accelerator, stop)
                stopped = not run_cell(cell, deadline) or stop.requested
            except NonFiniteLoss as error:
                failed.append(f"{folder}: {error}")
                print(failed[-1], flush=True)
            if stopped:
                break
    print(write_report(out, tasks, options.models, TIMES, settings(options)))
    done = GO_ON if stopped else "all is done" if not failed else "the rest is done"
    print(f"{done}; report: {out / 'report.md'}")
    if failed:
        raise SystemExit(f"{len(failed)} trainings failed: {'; '.join(failed)}")


def cells(options: Options) -> list[tuple[int, str, str]]:
    """(seed, data, model) of everything: one seed of all of it before a second of any."""
    return [(seed, data, spec) for seed in range(options.seeds) for data in options.data for spec in options.models]


def run_cell(cell: Cell, deadline: Deadline) -> bool:
    """Train and evaluate a cell; return whether it was finished and there is time for another.

    However short the time, at least one step is taken, or the evaluation that is all there is left to do.
    """
    if cell.step < cell.options.steps:
        cell.train(deadline)
        print(f"{cell.folder}: step {cell.step} of {cell.options.steps}, {cell.seconds:.0f} s", flush=True)
        if deadline.passed() or cell.stop.requested:
            return False
    cell.evaluate()
    return not deadline.passed()
