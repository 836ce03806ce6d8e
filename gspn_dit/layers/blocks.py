"""The layers that more than one family is made of. Maps are channels last, (B, H, W, C), throughout."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from gspn_dit.errors import InputError

SLICE_TOKENS = 2**14


def in_slices(forward: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward of a layer that sees every site alone, SLICE_TOKENS at a time on maps of more: a hidden layer of 4C
    channels then never exists whole. At inference only, and where torch.compile does not fuse the layer anyway."""

    @functools.wraps(forward)
    def sliced(self: nn.Module, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.shape[1] * x.shape[2] <= SLICE_TOKENS:
            return forward(self, x)
        tokens = x.reshape(-1, x.shape[-1])
        y = None
        for start in range(0, len(tokens), SLICE_TOKENS):
            part = forward(self, tokens[start : start + SLICE_TOKENS])
            y = part.new_empty(len(tokens), part.shape[-1]) if y is None else y
            y[start : start + SLICE_TOKENS] = part
        return y.unflatten(0, x.shape[:-1])

    return sliced


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, DiT's tanh-approximated GELU by default; each site alone."""

    def __init__(self, width: int, mlp_ratio: float, activation: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(mlp_ratio, int | float) or not 1 <= width * mlp_ratio < math.inf:
            raise InputError(f"mlp_ratio={mlp_ratio!r}: give a positive number, hidden channels over width")
        self.fc1 = linear(width, int(width * mlp_ratio))
        self.act = activation or nn.GELU(approximate="tanh")
        self.fc2 = linear(int(width * mlp_ratio), width)

    @in_slices
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SquaredReLU(nn.Module):
    """max(x, 0)², the activation of Primer (arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return x * x  # not square(), of which autocast on CUDA makes float32


class LayerNorm(nn.LayerNorm):
    """DiT's norm over channels, without weights of its own, in its input's dtype.

    Autocast on CUDA, not on a CPU, would make a float32 map of a bfloat16 one, and keep it so up to the next product.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return super().forward(x)


class DepthwiseConv(nn.Conv2d):
    """One k × k filter a channel, zero padded to keep the map's size: (B, H, W, C) to (B, H, W, C).

    The permuted views are what torch calls the channels_last memory format: nothing is copied.
    """

    def __init__(self, width: int, kernel_size: int, bias: bool = True) -> None:
        if not is_whole(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"conv_kernel={kernel_size!r}: give an odd number, so that the filter has a centre")
        super().__init__(width, width, kernel_size, padding=kernel_size // 2, groups=width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class FinalLayer(nn.Module):
    """DiT's last layer: a norm shifted and scaled by the condition, then a linear layer to the patch's pixels.

    Both linear layers start at zero, so a new model predicts 0.
    """

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(width)
        self.linear = linear(width, patch_values, zero=True)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 2 * width, zero=True))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive LayerNorm's affine part: x is (B, H, W, C), shift and scale are (B, 1, 1, C)."""
    return x * (1 + scale) + shift


def linear(fan_in: int, fan_out: int, bias: bool = True, zero: bool = False) -> nn.Linear:
    """A linear layer that starts at zero, or as DiT's: weights Xavier-uniform, bias zero."""
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def chunk_by_layer(chunk: int | None, global_layers: int | Sequence[int], depth: int) -> list[int | None]:
    """The `chunk` that each of `depth` layers hands to :func:`gspn_dit.ops.propagate`; None is a global scan.

    Args:
        chunk: Lines a local layer's scan runs over; None makes every layer global.
        global_layers: How many of the last layers are global, or the indices of those that are (-1 is the last).

    Raises:
        InputError: A chunk below 1, a count outside 0 … depth or an index outside the layers.
    """
    if chunk is not None and not (is_whole(chunk) and chunk >= 1):
        raise InputError(f"chunk={chunk!r}: give a number of lines from 1, or None for global scans in every layer")
    if is_whole(global_layers):
        if not 0 <= global_layers <= depth:
            raise InputError(f"global_layers={global_layers}: give a count from 0 to the {depth} layers there are")
        chosen = set(range(depth - global_layers, depth))
    else:
        indices = isinstance(global_layers, Sequence)
        if not indices or not all(is_whole(i) and -depth <= i < depth for i in global_layers):
            raise InputError(
                f"global_layers={global_layers!r}: give a count, or a list of indices of the layers 0 to {depth - 1}"
            )
        chosen = {i % depth for i in global_layers}
    return [None if i in chosen else chunk for i in range(depth)]


def is_whole(value: object) -> bool:
    """Whether a value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def without_autocast(device: torch.device) -> torch.autocast | nullcontext:
    """A block whose operations stay in their operands' dtype; on the meta device, which has no autocast, any block."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
