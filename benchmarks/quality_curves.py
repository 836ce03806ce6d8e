"""Held-out loss by step and by minute: networks trained alike for some minutes, and some more each time it is run.

`python -m benchmarks.quality_curves --out FOLDER [--seconds 180]` gives every model its share of the time and writes

    state/                            what the next run goes on from; --state FOLDER keeps it elsewhere
    curves.json, curves.md, curves.png      all that was seen so far, after each model

Models, data and steps are those of `benchmarks.quality`: the same samples in the same order with the same noise and
times for every model. The learning rate stays at its peak, so that the loss at any step is that of one longer
training. A model's seconds are those of its steps: no start, no look at the held-out loss, no checkpoint.
"""

from __future__ import annotations

from benchmarks.commands import QualityCurvesOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("quality_curves"))

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.commands import QualityOptions
from benchmarks.deadline import Deadline
from benchmarks.machine import machine
from benchmarks.quality_cell import Cell
from benchmarks.quality_data import TASKS, FashionTask, Task
from benchmarks.quality_model import make_model
from benchmarks.result_files import noted, origin, write_rows, write_text
from benchmarks.tables import header, row
from gspn_dit.devices import choose_device
from gspn_dit.ops.registry import require_kernels
from gspn_dit.precision import choose_precision
from gspn_dit.storage.files import begin_or_continue, replacing
from gspn_dit.training.stop_request import StopRequest

ENDLESS, WARMUP = 10**9, 200  # steps
SHARES = (0.25, 0.5, 1.0)  # of the steps, and of the time, that all models have had
Curve = Sequence[tuple[int, float, float]]  # step, seconds, held-out loss


def settings(options: Options) -> dict[str, Any]:
    """What a model is trained with from its first step to its last; models may be added."""
    keys = ("data", "seed", "width", "depth", "batch_size", "learning_rate", "held_out", "mixed_precision", "compile")
    return {key: getattr(options, key) for key in keys}


def cell_options(options: Options) -> QualityOptions:
    """The same for a cell of `benchmarks.quality`."""
    shared = {key: value for key, value in settings(options).items() if key not in ("data", "seed")}
    return QualityOptions(preset=options.preset, num_workers=options.num_workers, **shared)


def task_of(data: str) -> Task:
    """A data set by its name or its folder."""
    return TASKS[data]() if data in TASKS else FashionTask(Path(data))


def loss_at_step(curve: Curve, step: int) -> float | None:
    """The loss at the last look that was not after a step; None before the first look."""
    return next((loss for at, _, loss in reversed(curve) if at <= step), None)


def loss_at_time(curve: Curve, seconds: float) -> float | None:
    """The loss after so many seconds, on the line between two looks; None before the first and after the last."""
    for (_, start, before), (_, end, after) in pairwise(curve):
        if start <= seconds <= end:
            return before + (after - before) * (seconds - start) / max(end - start, 1e-9)
    return curve[0][-1] if curve and curve[0][1] == seconds else None


def tables(rows: dict[str, dict[str, Any]]) -> list[str]:
    """How far each model is; then the loss of all at the same steps, and after the same time."""
    lines = header(["model", "parameters, M", "steps", "minutes", "steps a second", "held-out loss"])
    for model, found in rows.items():
        speed = found["steps"] / found["seconds"] if found["seconds"] else 0
        last = f"{found['curve'][-1][-1]:.4f}" if found["curve"] else "–"
        size, minutes = f"{found['parameters'] / 1e6:.1f}", f"{found['seconds'] / 60:.1f}"
        lines.append(row([model, size, found["steps"], minutes, f"{speed:.1f}", last]))
    curves = {model: found["curve"] for model, found in rows.items()}
    if not all(curves.values()):
        return [*lines, "", "Not every model was looked at yet."]

    def cell(loss: float | None) -> str:
        return "–" if loss is None else f"{loss:.4f}"

    steps = [round(share * min(curve[-1][0] for curve in curves.values())) for share in SHARES]
    times = [share * min(curve[-1][1] for curve in curves.values()) for share in SHARES]
    lines += ["", *header(["held-out loss", *(f"at step {step:,}" for step in steps)])]
    lines += [row([model, *(cell(loss_at_step(curve, step)) for step in steps)]) for model, curve in curves.items()]
    lines += ["", *header(["held-out loss", *(f"after {seconds / 60:.1f} min" for seconds in times)])]
    lines += [row([model, *(cell(loss_at_time(curve, each)) for each in times)]) for model, curve in curves.items()]
    return lines


def draw(rows: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """The losses of all models by step and by minute."""
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_minute = figure.subplots(1, 2, sharey=True)
    for model, found in rows.items():
        steps, seconds, losses = zip(*found["curve"], strict=True) if found["curve"] else ((), (), ())
        by_step.plot(steps, losses, label=model)
        by_minute.plot([each / 60 for each in seconds], losses, label=model)
    by_step.set(xlabel="step", ylabel="held-out loss")
    by_minute.set(xlabel="minutes of training")
    for axes in (by_step, by_minute):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def write(out: Path, rows: dict[str, dict[str, Any]], options: Options, where: str) -> str:
    """Write what is known of all models; return the report."""
    write_rows(out / "curves.json", {"machine": where, **settings(options)}, rows)
    draw(rows, f"{options.data}, {where}", out / "curves.png")
    words = [
        f"The held-out loss is the flow's mean squared error on {options.held_out} images, each at ten times, of the "
        "averaged weights.",
        "Minutes are of steps alone, of one model at a time.",
        ", ".join(f"{key} {value}" for key, value in settings(options).items()),
    ]
    report = "\n".join([*tables(rows), "", *words, "", *origin(where, rows.values())])
    write_text(out / "curves.md", report)
    return report


def main(options: Options) -> None:
    """Train every model for its share of the time, from where it was left, and report after each."""
    deadline, device = Deadline(options.seconds), choose_device(options.device)
    options = replace(options, mixed_precision=choose_precision(options.mixed_precision, device).name)
    require_kernels(device)  # raises where the reference operator would be timed for want of it
    task, of_cells = task_of(options.data), cell_options(options)
    for spec in options.models:
        with torch.device("meta"):
            make_model(spec, task, of_cells)  # refuse what cannot be before anything is trained
    out, state = Path(options.out), Path(options.state)
    for folder in (out, state):
        folder.mkdir(parents=True, exist_ok=True)
    begin_or_continue(state / "settings.json", settings(options), "state")
    if device.index is not None:
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=options.mixed_precision)
    training = {"max_steps": options.steps or ENDLESS, "lr_schedule": "constant", "warmup_steps": WARMUP}
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stop.training = True
        for turn, spec in enumerate(options.models):
            share = Deadline(deadline.left / (len(options.models) - turn))
            cell = Cell(state / spec, task, spec, options.seed, of_cells, accelerator, stop, training)
            begun = cell.step
            cell.train(share, options.look_every)
            rows[spec] = noted(
                {
                    "parameters": cell.state.model.num_parameters(),
                    "steps": cell.step,
                    "seconds": cell.seconds,
                    "curve": cell.curve,
                    "losses": cell.losses,
                }
            )
            print(f"{spec}: from step {begun} to {cell.step}", flush=True)
            report = write(out, rows, options, machine(device.type))
            if stop.requested:
                break
    print(f"{report}\nRun it again to train on from {state}; report: {out / 'curves.md'}")
