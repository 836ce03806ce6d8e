"""The CPU rows of benchmarks/operator.py: the kernel, its reference and attention, in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.tables import header, row
from benchmarks.timing import wall_ms
from gspn_dit.ops import propagate

SHAPES = [(1, 16, 16, 384, 6), (1, 64, 64, 384, 6), (1, 64, 64, 384, 384), (1, 128, 128, 384, 6)]  # B, H, W, C, G
SCALING = [(1, side, side, 384, 6) for side in (32, 64, 128, 256)]


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


def forward_and_backward(function: Callable, inputs: list[torch.Tensor], repeats: int) -> tuple[float, float]:
    """Milliseconds of the forward pass alone, and of forward and backward."""
    grad = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    return wall_ms(forward, repeats), wall_ms(lambda: torch.autograd.grad(function(*inputs), inputs, grad), repeats)


def tables(repeats: int) -> list[str]:
    """Both tables."""
    return [*shape_table(repeats), "", *scaling_table(repeats)]


def shape_table(repeats: int) -> list[str]:
    """Two rows per shape: kernel, reference, attention, and the ratios."""
    names = (
        "shape (B,H,W,C)",
        "G",
        "pass",
        "cpu kernel ms",
        "reference ms",
        "attention ms",
        "× reference",
        "× attention",
    )
    lines = header(names)
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
            ms = f"{ours[i]:.2f}", f"{reference[i]:.1f}", f"{attention[i]:.1f}"
            ratios = f"{reference[i] / ours[i]:.0f}", f"{attention[i] / ours[i]:.1f}"
            lines.append(row([f"({b},{h},{w},{c})", g, name, *ms, *ratios]))
    return lines


def scaling_table(repeats: int) -> list[str]:
    """Forward time per pixel of the kernel as the map grows: constant if the operator is linear."""
    lines, costs = header(["map", "forward ms", "ns per pixel"]), []
    for shape in SCALING:
        inputs = operands(shape)
        with torch.no_grad():
            ms = wall_ms(partial(scan, "native-cpu", *inputs), repeats)
        costs.append(1e6 * ms / (shape[1] * shape[2]))
        lines.append(row([f"{shape[1]}×{shape[2]}, C=384, G=6", f"{ms:.2f}", f"{costs[-1]:.0f}"]))
    return [*lines, "", f"slowest over fastest per pixel: {max(costs) / min(costs):.2f}"]
