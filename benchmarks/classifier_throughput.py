"""How many images a second a classifier takes beside timm's, forward and in a training step.

Weights are random, which changes no time. All models are measured in one run, in turn, so that what disturbs the
machine disturbs all of them; a figure is the median of its calls.

    python -m benchmarks.classifier_throughput --image-sizes 224,384 --device cuda --out FILE.md
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from benchmarks.commands import run

    run("classifier_throughput")
    raise SystemExit

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.commands import ThroughputOptions as Options
from benchmarks.commands import fast_dtype
from benchmarks.deadline import Deadline
from benchmarks.machine import machine
from benchmarks.result_files import noted, write_report, write_rows
from benchmarks.tables import header, row
from gspn_dit.errors import InputError
from gspn_dit.models import create_classifier, list_classifiers
from gspn_dit.models.macs import count_macs
from gspn_dit.precision import autocast

PASSES = ("forward", "training step")


@dataclass
class Measured:
    """A model's figures at one size.

    Args:
        parameters: How many.
        macs: Multiply-accumulates of one image.
        seconds: Of every call, by pass.
        missing: Why a pass has none, by pass.
    """

    parameters: int
    macs: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {each: [] for each in PASSES})
    missing: dict[str, str] = field(default_factory=dict)


def make_model(name: str, image_size: int) -> nn.Module:
    """One of this package's classifiers, or one of timm's, freshly initialised for images of that size."""
    if name in list_classifiers():
        return create_classifier(name, in_chans=3)
    try:
        return timm.create_model(name, img_size=image_size)
    except TypeError:  # it takes images of any size
        return timm.create_model(name)


def macs_of(name: str, image_size: int) -> int:
    """Multiply-accumulates of one image."""
    with torch.device("meta"):
        model = make_model(name, image_size).eval()
        if name in list_classifiers():
            return count_macs(model, (image_size, image_size))
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


def calls_of(model: nn.Module, options: Options, image_size: int, dtype: str) -> dict[str, Callable[[], object]]:
    """A forward of the averaged kind, in evaluation mode without gradients, and a training step by AdamW, by pass."""
    device, layout = torch.device(options.device), torch.contiguous_format
    if options.channels_last:
        layout = torch.channels_last
    model = model.to(device, memory_format=layout)
    images = torch.randn(options.batch_size, 3, image_size, image_size, device=device).to(memory_format=layout)
    labels = torch.arange(options.batch_size, device=device)
    called = torch.compile(model, dynamic=False) if options.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    precision = "bf16" if dtype == "bfloat16" else "no"

    @torch.no_grad()
    def forward() -> None:
        model.eval()
        with autocast(device, precision):
            called(images)

    def step() -> None:
        model.train()
        with autocast(device, precision):
            loss = F.cross_entropy(called(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return dict(zip(PASSES, (forward, step), strict=True))


def timed(call: Callable[[], object], device: str) -> float:
    """Wall seconds of a call, waited for."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options: Options, image_size: int, dtype: str, deadline: Deadline) -> dict[str, Measured]:
    """The figures of all models at one size: each call once without counting, then in turn."""
    found, calls = {}, {}
    for name in options.names:
        torch.manual_seed(0)
        model = make_model(name, image_size)
        found[name] = Measured(sum(p.numel() for p in model.parameters()), macs_of(name, image_size))
        calls[name] = calls_of(model, options, image_size, dtype)
    for count in range(options.repeats + 1):  # the first does not count
        for name, each in calls.items():
            for which in PASSES:
                if which in found[name].missing or (count > 1 and deadline.passed()):
                    continue
                try:
                    seconds = timed(each[which], options.device)
                except torch.OutOfMemoryError:
                    found[name].missing[which] = "out of memory"
                    continue
                if count:
                    found[name].seconds[which].append(seconds)
    return found


def report(found: dict[str, Measured], options: Options, image_size: int) -> Iterator[str]:
    """The table of one size; ratios are to the first of timm's models."""
    other = next((name for name in options.names if name not in list_classifiers()), options.names[0])
    names = ["model", "parameters, M", "GMACs"]
    for which in PASSES:
        names += [f"{which}, images/s", f"of {other}"]
    yield from [f"## {image_size} × {image_size} pixels", "", *header(names)]
    rates = {name: {which: rate(each, which, options.batch_size) for which in PASSES} for name, each in found.items()}
    for name, each in found.items():
        cells = [name, f"{each.parameters / 1e6:.2f}", f"{each.macs / 1e9:.3g}"]
        for which in PASSES:
            ours, theirs = rates[name][which], rates[other][which]
            cells.append(each.missing.get(which, "–") if ours is None else f"{ours:.4g}")
            cells.append("–" if ours is None or theirs is None else f"{ours / theirs:.2f}×")
        yield row(cells)
    yield ""


def rows_of(found: dict[str, Measured], options: Options, image_size: int) -> dict[str, dict[str, Any]]:
    """What `benchmarks.targets` reads of one size: a row for each model and pass that has a figure."""
    rows = {}
    for name, each in found.items():
        for which in PASSES:
            if (speed := rate(each, which, options.batch_size)) is not None:
                settings = "compiled" if options.compile else "eager"
                rows[f"{name}, {which}, {image_size} px, {settings}"] = noted(
                    {"name": name, "pass": which, "pixels": image_size, "macs": each.macs, "images_per_second": speed}
                )
    return rows


def rate(measured: Measured, which: str, images: int) -> float | None:
    """Images a second by the median call; None without one."""
    seconds = measured.seconds[which]
    return images / statistics.median(seconds) if seconds else None


def main(options: Options) -> None:
    """Measure every model at every size, and write the tables, and beside them the same as JSON."""
    check(options)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    dtype, deadline = options.dtype or fast_dtype(options.device), Deadline(options.seconds)
    lines = [
        "# Throughput of classifiers",
        "",
        f"{options.batch_size} random images a call, {dtype}, {'channels last' if options.channels_last else 'NCHW'}, "
        f"{'compiled' if options.compile else 'not compiled'}, random weights; "
        f"medians of {options.repeats} calls at most, the models in turn.",
        "",
    ]
    rows: dict[str, dict[str, Any]] = {}
    for image_size in options.image_sizes:
        if deadline.passed():
            break
        found = measure(options, image_size, dtype, deadline)
        lines += report(found, options, image_size)
        rows |= rows_of(found, options, image_size)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    write_report(lines, machine(options.device), options.out)
    if options.out is not None:
        write_rows(Path(options.out).with_suffix(".json"), {"machine": machine(options.device)}, rows)


def check(options: Options) -> None:
    """Raise :class:`InputError` for a model that is nobody's."""
    for name in options.names:
        if name not in list_classifiers() and not timm.is_model(name):
            raise InputError(
                "is no classifier of this package or of timm",
                argument="names",
                value=name,
                wanted=f"{', '.join(list_classifiers())}, or a name of timm.list_models()",
            )
