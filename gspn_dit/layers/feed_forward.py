"""The feed-forward half of a block: every token by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from gspn_dit.errors import InputError, not_none
from gspn_dit.layers.fused import squared_relu
from gspn_dit.layers.linear import linear

SLICE_TOKENS = 2**14

Layer = TypeVar("Layer", bound=nn.Module)


def in_slices(forward: Callable[[Layer, Tensor], Tensor]) -> Callable[[Layer, Tensor], Tensor]:
    """The forward of a layer that treats every token alone, SLICE_TOKENS at a time on maps of more.

    A hidden layer of 4C channels then never exists whole. At inference only, and only where torch.compile does not
    fuse the layer anyway.
    """

    @functools.wraps(forward)
    def sliced(self: Layer, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.shape[1] * x.shape[2] <= SLICE_TOKENS:
            return forward(self, x)
        tokens = x.reshape(-1, x.shape[-1])
        y = None
        for start in range(0, len(tokens), SLICE_TOKENS):
            part = forward(self, tokens[start : start + SLICE_TOKENS])
            y = part.new_empty(len(tokens), part.shape[-1]) if y is None else y
            y[start : start + SLICE_TOKENS] = part
        return not_none(y).unflatten(0, x.shape[:-1])

    return sliced


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, DiT's tanh-approximated GELU by default; each token alone.

    (B, H, W, C) to (B, H, W, C).

    Args:
        width: Channels C.
        mlp_ratio: Hidden width over C.
        activation: In place of GELU.

    Raises:
        InputError: A ratio that leaves no hidden channel.
    """

    def __init__(self, width: int, mlp_ratio: float, activation: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(mlp_ratio, int | float) or not 1 <= width * mlp_ratio < math.inf:
            raise InputError(
                "give a positive number, hidden channels over width", argument="mlp_ratio", value=mlp_ratio
            )
        self.fc1 = linear(width, int(width * mlp_ratio))
        self.act = activation or nn.GELU(approximate="tanh")
        self.fc2 = linear(int(width * mlp_ratio), width)

    @in_slices
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SquaredReLU(nn.Module):
    """max(x, 0)², the activation of Primer (arXiv 2109.08668).

    Attributes:
        fusable: Whether torch.compile may make it a part of the product before it, which it can of the composition.
    """

    fusable: bool = False

    def forward(self, x: Tensor) -> Tensor:
        return squared_relu(x, as_composition=self.fusable and torch.compiler.is_compiling())
