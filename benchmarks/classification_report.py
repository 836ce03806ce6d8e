"""The table and the picture of what `benchmarks.classification` has finished so far."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.cells import Results, read_results, smoothed
from benchmarks.result_files import origin, write_text
from benchmarks.tables import header, row, spread
from gspn_dit.storage.files import replacing

NOTES = [
    "Mean ± standard deviation over the seeds. Top-1 in percent of the averaged weights: on all test pictures, of 28",
    "pixels or resized to 14 and 20 by bicubic interpolation, and on every second of them at 40 and 56.",
    "A baseline's feed-forward has the multiple of 1/8 of the width at which its cost at 28 pixels is nearest to ours.",
    "The loss is that of the last 100 steps, on altered pictures of several sizes, with smoothed labels.",
    "",
]


def write_report(out: Path, mixers: Sequence[str], settings: dict[str, Any]) -> str:
    """Write report.md and losses.png; return the report."""
    results = read_results(out, mixers)
    speed = json.loads((out / "speed.json").read_text()) if (out / "speed.json").exists() else None
    lines = [*table(results, speed["images"] if speed else {}), ""]
    if results:
        draw_losses(results, out / "losses.png")
        lines += NOTES
    finished = [run for runs in results.values() for run in runs]
    if speed:
        lines += [f"Images a second of training: one process, the mixers in turns; {speed['machine']};"]
        lines += [f"load average {speed['load']:.1f} of {speed['cores']} cores, of which it is one.", ""]
    lines += [", ".join(f"{key} {value}" for key, value in settings.items()), ""]
    report = "\n".join([*lines, *origin("; ".join(sorted({run["machine"] for run in finished})), finished)])
    write_text(out / "report.md", report)
    return report


def table(results: Results, speed: dict[str, float]) -> list[str]:
    """A row per mixer: its cost, its accuracy at each size, its speed."""
    sides = list(next(iter(results.values()))[0]["top1"]) if results else []
    names = [f"top-1 at {side} px" for side in sides]
    lines = header(["mixer", "seeds", "MLP ratio", "parameters, M", "MMACs", *names, "loss", "training images/s"])
    for mixer, runs in results.items():
        cost = [f"{runs[0]['mlp_ratio']:g}", f"{runs[0]['parameters'] / 1e6:.3f}", f"{runs[0]['macs'] / 1e6:.2f}"]
        accuracy = [spread([run["top1"][side] for run in runs], 2) for side in sides]
        loss = spread([statistics.mean(loss for _, loss in run["losses"][-10:]) for run in runs], 4)
        rate = f"{speed[mixer]:.0f}" if mixer in speed else "–"
        lines.append(row([mixer, len(runs), *cost, *accuracy, loss, rate]))
    return lines


def draw_losses(results: Results, path: Path) -> None:
    """Each mixer's training loss, the mean of its seeds over windows of a thirtieth of the run."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for mixer, runs in results.items():
        axes.plot(*smoothed([run["losses"] for run in runs]), label=mixer)
    axes.set(xlabel="step", ylabel="training loss, with label smoothing", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
