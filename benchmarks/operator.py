"""Speed of `propagate` against its reference and against softmax attention on the same tokens and heads.

`python -m benchmarks.operator [--repeats 7] [--out FILE.md]` prints one table for the CPU: medians of repeats, random
inputs, everything in one run on the machine that its last line names. `--device cuda --out FOLDER` is the table for a
GPU, with the byte floor and a kernel of the published per-line scheme beside it (benchmarks/operator_cuda.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from benchmarks.machine import machine
from gspn_dit.ops import propagate
from gspn_dit.ops.registry import find
from gspn_dit.options import command

SHAPES = [(1, 16, 16, 384, 6), (1, 64, 64, 384, 6), (1, 64, 64, 384, 384), (1, 128, 128, 384, 6)]  # B, H, W, C, G
SCALING = [(1, side, side, 384, 6) for side in (32, 64, 128, 256)]


@dataclass
class Options:
    """How to time the operator.

    Args:
        repeats: Timed calls of each case, after one that is not timed; by default 7 on the CPU and 50 on a GPU.
        out: Also write the tables to this Markdown file; on a GPU, to this folder.
        device: cpu or cuda.
    """

    repeats: int | None = None
    out: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"


def operands(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Random x, gates, λ and what the family has beside them, as float32 leaves.

    G < C as in gspn-dit: a group's gates side by side; f and s. G = C as in gspn: channels innermost; u.
    """
    b, h, w, c, g = shape
    if g < c:
        gates = torch.randn(b, h, w, g, 4, 3).permute(0, 1, 2, 4, 5, 3)
        input_gate = torch.rand(b, h, w, g, 4).transpose(3, 4)
        rest = torch.rand(4, c), torch.randn(4, c)
    else:
        gates, input_gate, rest = torch.randn(b, h, w, 4, 3, g), torch.rand(b, h, w, 4, g), (torch.rand(b, h, w, 4, g),)
    return [tensor.requires_grad_() for tensor in (torch.randn(b, h, w, c), gates, input_gate, *rest)]


def scan(
    backend: str, x: torch.Tensor, gates: torch.Tensor, input_gate: torch.Tensor, *rest: torch.Tensor
) -> torch.Tensor:
    """The operator on a set of operands."""
    factors = {"decay": rest[0], "scale": rest[1]} if len(rest) == 2 else {"output_gate": rest[0]}
    return propagate(x, gates, input_gate, **factors, backend=backend)


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call in milliseconds, the first call left out."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def forward_and_backward(function: Callable, inputs: list[torch.Tensor], repeats: int) -> tuple[float, float]:
    """Milliseconds of the forward pass alone, and of forward and backward."""
    grad = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    return median_ms(forward, repeats), median_ms(lambda: torch.autograd.grad(function(*inputs), inputs, grad), repeats)


def shape_rows(repeats: int) -> list[str]:
    """One row a shape: kernel, reference, attention, and the ratios."""
    rows = [
        "| shape (B,H,W,C) | G | pass | cpu kernel ms | reference ms | attention ms | × reference | × attention |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        b, h, w, c, g = shape
        inputs = operands(shape)
        qkv = [torch.randn(b, 6, h * w, c // 6, requires_grad=True) for _ in range(3)]
        ours = forward_and_backward(partial(scan, "native-cpu"), inputs, repeats)
        # the slow peers: fewer repeats, still a median of at least three
        few = max(3, repeats // 2)
        reference = forward_and_backward(partial(scan, "reference"), inputs, few)
        attention = forward_and_backward(F.scaled_dot_product_attention, qkv, few)
        for name, i in (("forward", 0), ("forward+backward", 1)):
            rows.append(
                f"| ({b},{h},{w},{c}) | {g} | {name} | {ours[i]:.2f} | {reference[i]:.1f} | {attention[i]:.1f} "
                f"| {reference[i] / ours[i]:.0f} | {attention[i] / ours[i]:.1f} |"
            )
    return rows


def scaling_rows(repeats: int) -> list[str]:
    """Forward cost a pixel of the kernel as the map grows: flat if the operator is linear."""
    rows = ["| map | forward ms | ns a pixel |", "|---|---|---|"]
    costs = []
    for shape in SCALING:
        inputs = operands(shape)
        with torch.no_grad():
            ms = median_ms(partial(scan, "native-cpu", *inputs), repeats)
        costs.append(1e6 * ms / (shape[1] * shape[2]))
        rows.append(f"| {shape[1]}×{shape[2]}, C=384, G=6 | {ms:.2f} | {costs[-1]:.0f} |")
    rows.append(f"\nslowest over fastest a pixel: {max(costs) / min(costs):.2f}")
    return rows


def main(options: Options) -> None:
    """Time the operator against its peers, in float32 on the CPU or as on a GPU's own list."""
    available, detail = find(f"native-{options.device}").status()
    if not available:
        raise SystemExit(f"nothing to measure: {detail}")
    torch.manual_seed(0)
    if options.device == "cuda":
        from benchmarks.operator_cuda import run_cases

        out = Path(options.out or "benchmarks/results")
        out.mkdir(parents=True, exist_ok=True)
        return run_cases(out, options.repeats or 50)
    repeats = options.repeats or 7
    report = "\n".join([*shape_rows(repeats), "", *scaling_rows(repeats), "", f"CPU float32, {machine()}"])
    print(report)
    if options.out:
        Path(options.out).write_text(report + "\n")


if __name__ == "__main__":
    command(main, Options, prog="python -m benchmarks.operator")
