"""GSPN propagation in plain PyTorch: the definition that every kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Direction → (axis of (B, H, W, C) along which lines follow each other, whether they are read from the far end).
DIRECTIONS = {"down": (1, False), "up": (1, True), "right": (2, False), "left": (2, True)}


def line_weights(logits: Tensor) -> Tensor:
    """Row-stochastic weights (..., P, 3, G) of the logits at P positions along a line, neighbour order (-1, 0, +1).

    A sigmoid of each logit, divided by their sum over the neighbours inside the map (the Stability-Context Condition,
    arXiv 2501.12381). As a softmax over log-sigmoids it stays finite for logits of any size.
    """
    neighbours = F.logsigmoid(logits)
    outside = torch.zeros(logits.shape[-3], 3, dtype=torch.bool, device=logits.device)
    outside[0, 0] = outside[-1, 2] = True
    return neighbours.masked_fill(outside[..., None], -torch.inf).softmax(dim=-2)


def propagate_reference(
    x: Tensor,
    gates: Tensor,
    lam: Tensor,
    out: Tensor | None,
    decay: Tensor | None,
    scale: Tensor | None,
    chunk: int | None,
    directions: Sequence[str],
) -> Tensor:
    """:func:`gspn_dit.ops.propagate` without its checks, differentiable by autograd, in float32 or above."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups = lam.shape[-1]
    value = x.to(dtype).unflatten(-1, (groups, -1))  # (B, H, W, G, D)
    y = torch.zeros_like(value)
    for k, direction in enumerate(directions):
        axis, far_end_first = DIRECTIONS[direction]
        # lines first: (L, B, P, ...)
        weights = line_weights(gates[:, :, :, k].to(dtype).movedim(axis, 0))[..., None]  # (L, B, P, 3, G, 1)
        driven = (lam[:, :, :, k, :, None].to(dtype) * value).movedim(axis, 0)  # (L, B, P, G, D)
        lines = len(driven)
        h: list[Tensor] = [torch.empty(0)] * lines
        for i in reversed(range(lines)) if far_end_first else range(lines):
            before = i + 1 if far_end_first else i - 1
            if not 0 <= before < lines or (chunk is not None and before // chunk != i // chunk):
                h[i] = driven[i]
            else:
                minus, centre, plus = weights[i].unbind(dim=2)
                padded = F.pad(h[before], (0, 0, 0, 0, 1, 1))  # a zero position at either end of the line
                carried = minus * padded[:, :-2] + centre * h[before] + plus * padded[:, 2:]
                h[i] = (carried if decay is None else decay[k].to(dtype).view(groups, -1) * carried) + driven[i]
        scanned = torch.stack(h).movedim(0, axis)
        if out is not None:
            scanned = out[:, :, :, k, :, None].to(dtype) * scanned
        y = y + (scanned if scale is None else scale[k].to(dtype).view(groups, -1) * scanned)
    return y.flatten(-2).to(x.dtype)
