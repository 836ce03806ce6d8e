"""GSPN propagation in plain PyTorch: the definition that every backend is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn_dit.ops.backend import OPERANDS, Call, Status

# Direction → (axis of (B, H, W, C) along which lines follow each other, whether they are read from the far end).
DIRECTIONS = {"down": (1, False), "up": (1, True), "right": (2, False), "left": (2, True)}


def borders(length: int, span: int = 0, first: int = 0) -> list[int]:
    """Where the spans of an axis of `length` tokens begin, and, last, the axis' end.

    A span begins at every `span`-th token from `first` on. An axis of at most `span` tokens is one, wherever borders
    would be, and so is any axis for a span of 0.
    """
    inner = range(first or span, length, span) if 0 < span < length else ()
    return [0, *inner, length]


def line_weights(logits: Tensor, window: int = 0, shift: int = 0) -> Tensor:
    """Row-stochastic weights (..., P, 3, G) of the logits at P positions along a line, neighbour order (-1, 0, +1).

    A sigmoid of each logit, divided by their sum over the neighbours inside the map and the window (the
    Stability-Context Condition, arXiv 2501.12381). As a softmax over log-sigmoids it stays finite for logits of any
    size.
    """
    neighbours = F.logsigmoid(logits)
    positions = logits.shape[-3]
    outside = torch.zeros(positions, 3, dtype=torch.bool, device=logits.device)
    *starts, end = borders(positions, window, shift)
    outside[starts, 0] = True
    outside[[border - 1 for border in (*starts[1:], end)], 2] = True
    return neighbours.masked_fill(outside[..., None], -torch.inf).softmax(dim=-2)


def propagate_reference(call: Call) -> Tensor:
    """:func:`gspn_dit.ops.propagate` without its checks, differentiable by autograd, in float32 or above."""
    x, gates, input_gate, output_gate, decay, scale, chunk, window, shift, directions = call
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups = input_gate.shape[-1]
    value = x.to(dtype).unflatten(-1, (groups, -1))  # (B, H, W, G, D)
    y = torch.zeros_like(value)
    for k, direction in enumerate(directions):
        axis, far_end_first = list(DIRECTIONS.values())[direction]
        # lines first: (L, B, P, ...)
        logits = gates[:, :, :, k].to(dtype).movedim(axis, 0)
        weights = line_weights(logits, window, shift)[..., None]  # (L, B, P, 3, G, 1)
        driven = (input_gate[:, :, :, k, :, None].to(dtype) * value).movedim(axis, 0)  # (L, B, P, G, D)
        lines = len(driven)
        starts = set(borders(lines, window or chunk, shift))
        h: list[Tensor] = [torch.empty(0)] * lines
        for i in reversed(range(lines)) if far_end_first else range(lines):
            before = i + 1 if far_end_first else i - 1
            if max(before, i) in starts:
                h[i] = driven[i]
            else:
                minus, centre, plus = weights[i].unbind(dim=2)
                padded = F.pad(h[before], (0, 0, 0, 0, 1, 1))  # a zero position at either end of the line
                carried = minus * padded[:, :-2] + centre * h[before] + plus * padded[:, 2:]
                h[i] = (carried if decay is None else decay[k].to(dtype).view(groups, -1) * carried) + driven[i]
        scanned = torch.stack(h).movedim(0, axis)
        if output_gate is not None:
            scanned = output_gate[:, :, :, k, :, None].to(dtype) * scanned
        y = y + (scanned if scale is None else scale[k].to(dtype).view(groups, -1) * scanned)
    return y.flatten(-2).to(x.dtype)


class Reference:
    """The backend `reference`: every call, on any device, and slow."""

    name = "reference"
    device_types = None
    priority = 0

    def status(self, device: torch.device | None = None) -> Status:
        """Available everywhere."""
        return Status(True, "plain PyTorch, any device")

    def supports(self, call: Call, backward: bool = False) -> str | None:
        """None: it runs every call."""
        return None

    def forward(self, call: Call) -> Tensor:
        """y."""
        return torch.empty_like(call.x).copy_(propagate_reference(call))

    def backward(self, grad: Tensor, call: Call) -> tuple[Tensor, ...]:
        """Gradients of the operands: inside a custom op autograd does not record, torch.func does."""
        present = {name: operand for name, operand in zip(OPERANDS, call.operands, strict=True) if operand is not None}
        (grads,) = torch.func.vjp(lambda operands: self.forward(call._replace(**operands)), present)[1](grad)
        return tuple(
            torch.empty_like(present[name]).copy_(grads[name]) if name in present else grad.new_empty(0)
            for name in OPERANDS
        )
