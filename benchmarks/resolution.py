"""Time and memory of whole denoisers by image size: GSPN-DiT against DiT and, in its own block, other mixers.

`python -m benchmarks.resolution [--device cuda] [--time-budget SECONDS] [--out PREFIX]` measures a forward and a
training step of every model at every size, each in a process of its own, and writes PREFIX.json, PREFIX.md and
PREFIX.png after every measurement; what benchmarks/targets.yaml asks for comes first. What PREFIX.json already holds is
kept: the same command goes on where the last one stopped; delete the file to measure anew. Every model gets its best
settings, those that are fastest at TRIAL_PIXELS: eager or torch.compile, and on the CPU float32 or bfloat16; with
`--max-autotune true` also torch.compile in that mode, which takes longer to compile. On a GPU all is bfloat16, and DiT
has the faster of torch's flash and cuDNN attention.
"""

from __future__ import annotations

from benchmarks.commands import ResolutionOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("resolution"))

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.deadline import GO_ON, Deadline
from benchmarks.machine import machine
from benchmarks.resolution_case import LONGEST_WHOLE, Case
from benchmarks.result_files import noted, origin, saved_rows, write_rows, write_text
from benchmarks.tables import figure, header, ratio, row
from gspn_dit.arguments import CompileMode
from gspn_dit.storage.files import replacing

STEPS = ("forward", "training")
TRIAL_PIXELS = 256
FIRST = (  # of every model in turn; what else is asked for comes after it
    ("forward", 256),
    ("training", 256),
    ("forward", 512),
    ("forward", 1024),
    ("training", 512),
    ("training", 1024),
    ("forward", 4096),
    ("forward", 16384),
)
# A batch has the pixels of one image of this side, and at least one image: enough tokens to keep the machine busy.
BATCH_PIXELS = {"cpu": 512, "cuda": 2048}
COLOURS = {
    "DiT": "tab:red",
    "linear attention": "tab:orange",
    "window attention": "tab:green",
    "GSPN-DiT": "tab:blue",
}


def models(size: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every model's name in the tables, its preset and what is changed in it."""
    return {
        "DiT": (f"dit-{size}-2", {}),
        "linear attention": (f"gspn-dit-{size}-2", {"mixer": "linear"}),
        "window attention": (f"gspn-dit-{size}-2", {"mixer": "window"}),
        "GSPN-DiT": (f"gspn-dit-{size}-2", {}),
    }


class Results:
    """The measurements of a folder: read when it is opened, written after each."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.path = Path(f"{options.out}.json")
        torch.set_num_threads(options.threads)
        self.settings = {"machine": machine(options.device), "size": options.size}
        self.rows = saved_rows(self.path, self.settings)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, case: Case, measured: dict[str, Any]) -> None:
        """Take in a measurement, and write all three files."""
        self.rows[case.key] = noted({**asdict(case), **measured})
        write_rows(self.path, self.settings, self.rows)
        write_text(self.path.with_suffix(".md"), report(self))
        with replacing(self.path.with_suffix(".png")) as temporary:
            plot(self, temporary)

    def best(self, model: str, step: str) -> dict[str, Any] | None:
        """The fastest of a model's trials of settings; None until all are measured."""
        trials = [self.rows.get(trial.key) for trial in self.trials(model, step)]
        if None in trials or not any("seconds" in row for row in trials):
            return None
        return min((row for row in trials if "seconds" in row), key=lambda row: row["seconds"])

    def trials(self, model: str, step: str) -> list[Case]:
        """The settings among which a model's are chosen, at the size where they are."""
        options = self.options
        name, overrides = models(options.size)[model]
        pixels = TRIAL_PIXELS if TRIAL_PIXELS in options.pixels else min(options.pixels)
        compilings: list[tuple[bool, CompileMode]] = [(False, "default"), (True, "default")]
        if options.max_autotune:
            compilings.append((True, "max-autotune"))
        return [
            Case(
                model,
                name,
                step,
                pixels,
                batch_of(options.device, pixels),
                dtype,
                compiled,
                options.device,
                options.threads,
                options.repeats,
                overrides,
                mode,
            )
            for dtype, (compiled, mode) in product(options.dtypes, compilings)
        ]

    def cases(self) -> Iterator[Case]:
        """Everything to measure, in order: GSPN-DiT and DiT before their peers, trials before what they choose."""
        pairs = [pair for pair in FIRST if pair[1] in self.options.pixels]
        pairs += [(step, pixels) for pixels, step in product(self.options.pixels, STEPS) if (step, pixels) not in pairs]
        peers = [model for model in models(self.options.size) if model not in ("GSPN-DiT", "DiT")]
        for some in ("GSPN-DiT", "DiT"), peers:
            for (step, pixels), model in product(pairs, some):
                yield from self.trials(model, step)
                yield self.chosen(model, step, pixels)

    def chosen(self, model: str, step: str, pixels: int) -> Case:
        """A model's case at a size, with its best settings; the last of its trials' while those are incomplete."""
        best, last = self.best(model, step), self.trials(model, step)[-1]
        if best is not None:
            mode = best.get("compile_mode", "default")  # of rows from before there was a choice
            last = replace(last, dtype=best["dtype"], compiled=best["compiled"], compile_mode=mode)
        return replace(last, pixels=pixels, batch=batch_of(self.options.device, pixels))

    def row(self, model: str, step: str, pixels: int) -> dict[str, Any] | None:
        """The measurement that the tables show, if it is there."""
        return self.rows.get(self.chosen(model, step, pixels).key)


def batch_of(device: str, pixels: int) -> int:
    """Images in a batch."""
    return max(1, (BATCH_PIXELS[device] // pixels) ** 2)


def report(results: Results) -> str:
    """The tables in Markdown."""
    names = list(models(results.options.size))
    lines = header(
        [
            "step",
            "image",
            "batch",
            *(f"{name}, ms" for name in names),
            *(f"times the speed of {name}" for name in names[:-1]),
            *(f"{name}, ns per pixel" for name in names),
            *(f"{name}, MB" for name in names),
        ]
    )
    for step, pixels in product(STEPS, sorted(results.options.pixels)):
        rows = [results.row(name, step, pixels) for name in names]
        if not any(rows):
            continue
        batch = batch_of(results.options.device, pixels)
        per_pixel = 1e9 / (batch * pixels**2)
        cells = [
            *(figure(measured, "seconds", 1e3) for measured in rows),
            *(ratio(other, rows[-1]) for other in rows[:-1]),
            *(figure(measured, "seconds", per_pixel) for measured in rows),
            *(figure(measured, "bytes", 1e-6) for measured in rows),
        ]
        lines.append(row([step, f"{pixels} px", batch, *cells]))
    lines += [
        "",
        *notes(results),
        "",
        *trial_lines(results),
        "",
        *origin(results.settings["machine"], results.rows.values()),
    ]
    return "\n".join(lines)


def notes(results: Results) -> list[str]:
    """What the table means."""
    presets = ", ".join(
        f"{model}: `{name}`" + "".join(f" with {key}={value!r}" for key, value in overrides.items())
        for model, (name, overrides) in models(results.options.size).items()
    )
    memory = {
        "cpu": "the most resident memory in a call, less that before it, without what malloc keeps of freed blocks",
        "cuda": "CUDA's max_memory_allocated in a call, less the memory allocated before it",
    }[results.options.device]
    return [
        f"{presets}. Medians of 3 to {results.options.repeats} calls after two that do not count; random weights, none "
        "of them zero, and random inputs. A training step is forward, flow loss, backward and AdamW's step.",
        f"MB (10⁶ bytes): {memory}, so weights and the optimiser's state are not in it, gradients are.",
        f"~ not run whole, because a call would take over {LONGEST_WHOLE:.0f} s or more memory than there is: one "
        "block of each kind is measured, times their number, plus the ends.",
    ]


def trial_lines(results: Results) -> list[str]:
    """The choice of settings."""
    words = [case.settings for case in results.trials("DiT", "forward")]
    pixels = results.trials("DiT", "forward")[0].pixels
    lines = [
        f"Settings tried at {pixels} px, ms; the fastest of each row is the one used at all sizes."
        + (" DiT has the faster of flash and cuDNN attention." if results.options.device == "cuda" else ""),
        "",
        *header(["model", "step", *words]),
    ]
    for model, step in product(models(results.options.size), STEPS):
        rows = [results.rows.get(trial.key) for trial in results.trials(model, step)]
        lines.append(row([model, step, *(figure(trial, "seconds", 1e3) for trial in rows)]))
    if "bfloat16" in results.options.dtypes:
        lines.append(
            "\nIn a forward bfloat16 is the weights' type; in training it is autocast's, over float32 weights, and the "
            "residual stream's: DiT's positions are cast to it, here alone; as published, its stream would be float32."
        )
    return lines


def plot(results: Results, path: Path) -> None:
    """Time and memory by size, log-log, hollow where a figure is a sum of blocks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    units = {"seconds": ("ms an image", 1e3), "bytes": ("MB an image, above the weights", 1e-6)}
    for (row_axes, (what, (unit, scale))), (i, step) in product(
        zip(axes, units.items(), strict=True), enumerate(STEPS)
    ):
        axis = row_axes[i]
        for model, colour in COLOURS.items():
            rows = [row for pixels in sorted(results.options.pixels) if (row := results.row(model, step, pixels))]
            rows = [row for row in rows if what in row]
            sides, values = [row["pixels"] for row in rows], [scale * row[what] / row["batch"] for row in rows]
            axis.plot(sides, values, color=colour, label=model)
            for side, value, row in zip(sides, values, rows, strict=True):
                axis.plot(side, value, "o", color=colour, markerfacecolor=colour if row["whole"] else "white")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log" if axis.dataLim.y1 > 0 else "linear")  # nothing drawn yet has no logarithm
        axis.set_xticks(results.options.pixels, [str(pixels) for pixels in results.options.pixels])
        axis.grid(alpha=0.3)
        axis.set_title("forward" if step == "forward" else "training step")
        axis.set_ylabel(unit)
    for axis in axes[1]:
        axis.set_xlabel("side of the image, pixels")
    axes[0][0].legend(frameon=False)
    name = models(results.options.size)["GSPN-DiT"][0]
    figure.suptitle(f"{name} and its peers; hollow: one block measured, times the depth\n{results.settings['machine']}")
    figure.savefig(path, dpi=120, format="png")


class CaseFailed(Exception):
    """A case whose process ended with an error, which is its text."""


def run_case(case: Case, seconds: float) -> dict[str, Any] | None:
    """Measure in a new process; None if that takes longer than there is time. Raises :class:`CaseFailed`."""
    arguments = [sys.executable, "-m", "benchmarks.resolution_case", json.dumps(asdict(case))]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == -9:  # the system's way to say that memory ran out
        return {"error": "out of memory"}
    if done.returncode:
        raise CaseFailed(done.stderr.strip() or f"exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(options: Options) -> None:
    """Measure a forward and a training step of every model at every size, and draw them.

    A case that fails is tried again by the next command; this one goes on, and ends with an error.
    """
    deadline = Deadline(options.time_budget)
    results, failed = Results(options), []
    for case in results.cases():
        if case.key in results.rows:
            continue
        left = deadline.left
        try:
            measured = run_case(case, left) if left > 0 else None
        except CaseFailed as error:
            failed.append(case.key)
            print(f"{case.key}: FAILED\n{error}", flush=True)
            continue
        if measured is None and left < 0.9 * options.time_budget:
            print(f"{case.key}: {GO_ON}")
            break
        measured = measured or {"error": f"over {left:.0f} s"}  # as it would be again
        results.add(case, measured)
        print(
            f"{case.key}: {figure(measured, 'seconds', 1e3)} ms, {figure(measured, 'bytes', 1e-6)} MB",
            flush=True,
        )
    print(report(results))
    if failed:
        raise SystemExit(f"{len(failed)} cases failed: {'; '.join(failed)}")
