"""What lies between the products and scans of a block: each function is one pass over the map on a GPU.

Each is defined by the composition of torch's functions that it ends with. That is what runs on CPUs, in float64,
where Triton is missing or does not work, and on other makers' devices; elsewhere a kernel of `gspn_dit.ops.passes`
computes the same in float32 and rounds once, at the end, where the composition rounds after each step. GSPN_DIT_FUSED=0
in the environment turns the kernels off.

A map is (B, H, W, C). A modulation is the vectors that a pass needs, in the order gate, shift, scale: as one tensor
(B, 1, 1, n, C) or (1, 1, 1, n, C), and maybe a second one, the offset, that is to be added to it; or as n tensors that
broadcast with the map. Of the latter, and of a branch in another shape than x, the composition runs everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn_dit.layers.norm import without_autocast
from gspn_dit.ops.passes import take

EPSILON = 1e-6
PASSES = (2, 3, 1)  # vectors of a block's three passes: shift and scale; gate, shift and scale; gate
PASSES_WITH_TEXT = (2, 3, 3, 1)  # of a block with cross-attention between mixer and feed-forward

Modulation = Tensor | Sequence[Tensor]


def modulations(
    x: Tensor, modulation: Tensor, offset: Tensor | None = None, passes: Sequence[int] = PASSES
) -> list[tuple[Modulation, Tensor | None]]:
    """What the passes of a block over the map x take for `modulation` and `offset`.

    An offset is added once for all of them, unless each of their kernels does so by the way.

    Args:
        x: The block's input.
        modulation: Shift, scale and gate of one part of the block after the other, (B, 1, 1, n, C).
        offset: What the block adds to it, (B, 1, 1, n, C) or (1, 1, 1, n, C).
        passes: How many of the n vectors each pass takes.
    """
    if take(x, modulation, offset):
        offsets = (None,) * len(passes) if offset is None else offset.split(list(passes), -2)
        return list(zip(modulation.split(list(passes), -2), offsets, strict=True))
    vectors = _vectors(modulation, offset)
    ends = accumulate(passes)
    return [(vectors[end - count : end], None) for count, end in zip(passes, ends, strict=True)]


def modulated_norm(x: Tensor, modulation: Modulation, offset: Tensor | None = None) -> Tensor:
    """Adaptive LayerNorm (DiT, arXiv 2212.09748, section 3.2): a norm over channels, times 1 + scale, plus shift."""
    if take(x, modulation, offset):
        from gspn_dit.ops.passes import operators

        return operators.modulated_norm(x, _of_each(x, modulation), _of_each(x, offset))[0]
    shift, scale = _vectors(modulation, offset)
    return _layer_norm(x) * (1 + scale) + shift


def gated_residual(x: Tensor, branch: Tensor, modulation: Modulation, offset: Tensor | None = None) -> Tensor:
    """x + gate · branch, the end of half a block."""
    if branch.shape == x.shape and take(x, modulation, offset):
        from gspn_dit.ops.passes import operators

        return operators.gated_residual(x, branch, _of_each(x, modulation), _of_each(x, offset))
    (gate,) = _vectors(modulation, offset)
    return x + gate * branch


def gated_residual_norm(
    x: Tensor, branch: Tensor, modulation: Modulation, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + gate · branch, and its modulated norm: the end of half a block and the start of the next."""
    if branch.shape == x.shape and take(x, modulation, offset):
        from gspn_dit.ops.passes import operators

        return operators.gated_residual_norm(x, branch, _of_each(x, modulation), _of_each(x, offset))[:2]
    gate, *others = _vectors(modulation, offset)
    total = gated_residual(x, branch, [gate])
    return total, modulated_norm(total, others)


def squared_relu(x: Tensor, as_composition: bool = False) -> Tensor:
    """max(x, 0)², the activation of Primer (arXiv 2109.08668), of a tensor of any shape; by no kernel if so asked."""
    if not as_composition and take(x):
        from gspn_dit.ops.passes import operators

        return operators.squared_relu(x)
    x = x.relu()
    return x * x  # not square(), of which autocast on CUDA makes float32


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One k × k filter per channel, (C, 1, k, k) with k odd, zero padded to keep the map's size, plus a bias (C,).

    The kernel is for k = 3. Other filters are cuDNN's: the nine weights of a channel fit registers, 25 and 49 do not.
    The permuted views are what torch calls the channels_last memory format: nothing is copied.
    """
    if take(x) and weight.shape[-1] == 3:
        from gspn_dit.ops.passes import operators

        if torch.is_autocast_enabled("cuda"):  # which casts a convolution's input
            x = x.to(torch.get_autocast_dtype("cuda"))
        return operators.depthwise_conv(x, weight, bias)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return y.permute(0, 2, 3, 1)


def _layer_norm(x: Tensor) -> Tensor:
    """The norm without weights, in x's dtype.

    Autocast on CUDA, not on a CPU, would make a float32 map of a bfloat16 one, and keep it so up to the next product.
    """
    with without_autocast(x.device):
        return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def _vectors(modulation: Modulation, offset: Tensor | None) -> Sequence[Tensor]:
    """A modulation, with its offset added, as tensors that broadcast with the map."""
    if not isinstance(modulation, Tensor):
        return modulation
    return (modulation if offset is None else modulation + offset).unbind(-2)


def _of_each(x: Tensor, vectors: Modulation | None) -> Tensor | None:
    """A modulation that :func:`take` takes, or its offset, for each image of x: (B, n, C), a view."""
    if vectors is None:
        return None
    assert isinstance(vectors, Tensor)
    return vectors.expand(len(x), *vectors.shape[1:]).view(len(x), *vectors.shape[-2:])
