"""Tables and pictures of what `benchmarks.quality` has finished so far."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.quality_data import Task
from benchmarks.result_files import origin, write_text
from benchmarks.tables import header, row, spread
from gspn_dit.storage.files import replacing
from gspn_dit.storage.pictures import load_image

Results = dict[str, list[dict[str, Any]]]  # by model, a result a seed


def write_report(
    out: Path, tasks: dict[str, Task], models: Sequence[str], times: Sequence[float], settings: dict[str, Any]
) -> str:
    """Write report.md, losses.png and a picture of samples of each data set; return the report."""
    lines, curves = [], {}
    for data, task in tasks.items():
        results = read_results(out / data, models)
        if not results:
            continue
        lines += [f"## {data}: {len(task.train):,} training images, {tokens(task)} tokens", ""]
        lines += [*figures_table(results, task), "", *times_table(results, times), ""]
        curves[data] = results
        draw_samples(out / data, results, out / f"samples-{data}.png")
    if curves:
        draw_losses(curves, out / "losses.png")
    lines.append("Mean ± standard deviation over the seeds; the held-out loss is the mean squared error of the flow's")
    lines.append("velocity, of the averaged weights, with the same noise and times for every model. Samples without")
    lines.append("guidance. FD and accuracy are the packaged classifiers' of digits and of photos.")
    finished = [run for found in curves.values() for runs in found.values() for run in runs]
    machines = sorted({run["machine"] for run in finished})
    lines += ["", ", ".join(f"{key} {value}" for key, value in settings.items()), ""]
    report = "\n".join([*lines, *origin("; ".join(machines), finished)])
    write_text(out / "report.md", report)
    return report


def read_results(folder: Path, models: Sequence[str]) -> Results:
    """The finished results of one data set, by model, those of no seed left out."""
    found = {
        model: [json.loads(path.read_text()) for path in sorted((folder / model).glob("seed-*/result.json"))]
        for model in models
    }
    return {model: results for model, results in found.items() if results}


def tokens(task: Task) -> str:
    """The map of tokens, as 32×32."""
    return "×".join(str(side // task.patch_size) for side in task.latent_shape[1:])


def figures_table(results: Results, task: Task) -> list[str]:
    """A row per model: its costs, its held-out loss and its samples' figures."""
    names = [f"{name} {'↑' if more else '↓'}" for name, _, more in task.figures]
    lines = header(["model", "seeds", "parameters, M", "GMACs", "training s", "held-out loss ↓", *names])
    for model, runs in results.items():
        size = f"{runs[0]['parameters'] / 1e6:.2f}", f"{runs[0]['gmacs']:.2f}"
        seconds = spread([run["training_seconds"] for run in runs], 0)
        loss = spread([statistics.mean(run["held_out_loss"]) for run in runs], 4)
        judged = (spread([run["figures"][name] for run in runs], digits) for name, digits, _ in task.figures)
        lines.append(row([model, len(runs), *size, seconds, loss, *judged]))
    return lines


def times_table(results: Results, times: Sequence[float]) -> list[str]:
    """A row per model: the held-out loss at each time, the mean of the seeds."""
    lines = header(["held-out loss at t =", *(f"{t:.2f}" for t in times)])
    for model, runs in results.items():
        means = [statistics.mean(losses) for losses in zip(*(run["held_out_loss"] for run in runs), strict=True)]
        lines.append(row([model, *(f"{mean:.4f}" for mean in means)]))
    return lines


def draw_losses(curves: dict[str, Results], path: Path) -> None:
    """A panel a data set: each model's training loss, the mean of its seeds over windows of a fiftieth of the run."""
    figure = Figure(figsize=(6 * len(curves), 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (data, results) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for model, runs in results.items():
            losses = [statistics.mean(step) for step in zip(*(run["losses"] for run in runs), strict=True)]
            window = max(1, len(losses) // 50)
            ends = range(window, len(losses) + 1, window)
            axes.plot(ends, [statistics.mean(losses[end - window : end]) for end in ends], label=model)
        axes.set(xlabel="step", ylabel="training loss", title=data, yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_samples(folder: Path, results: Results, path: Path) -> None:
    """The samples of each model's first seed side by side, drawn from the same noise."""
    figure = Figure(figsize=(3 * len(results), 3.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (model, runs) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        axes.imshow(load_image(folder / model / f"seed-{runs[0]['seed']}" / "samples.png"), interpolation="nearest")
        axes.set_title(model, fontsize="small")
        axes.axis("off")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
