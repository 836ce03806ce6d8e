"""Kernels of the modulated norm and of gated residuals, and how they are launched.

For a token x of C channels, with the mean m and r = 1 / √(variance + ε) of its channels:

    n = r (x - m),   y = n (1 + scale) + shift

Backward, with g = (1 + scale) dy and means over the channels of the token:

    dx = r (g - mean(g) - n mean(g n)),   dshift = Σ dy,   dscale = Σ dy n

The sums run over the tokens of an image. A program adds up a slice of them, and `Tensor.sum` the slices, so the order
is always the same. In a residual, t = x + gate · branch takes x's place, and dbranch = gate dt, dgate = Σ branch dt.

Gate, shift and scale are the vectors of an image in a modulation, in this order, those that there are. Where an offset
is given, of the same shape, it is added to them here, in float32; so both have the same gradient.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from gspn_dit.ops.passes import on_its_device

EPSILON = 1e-6
WARPS = 8
FORWARD_TILE = 8192  # elements: 32 a thread
BACKWARD_TILE = 2048  # 8 a thread of each of up to six maps, and of three sums
SLICES = 1024  # programs that share a map's sums, for some of them on every multiprocessor
SLICE_TOKENS = 8  # at least, so that sums are small beside the map


@triton.jit
def _vector(
    modulation,
    offset,
    number: tl.constexpr,
    image,
    modulation_stride,
    offset_stride,
    channel,
    channels,
    OFFSET: tl.constexpr,
):
    """A vector of an image's modulation, (1, BLOCK) in float32."""
    at, there = number * channels + channel, channel < channels
    vector = tl.load(modulation + image.to(tl.int64) * modulation_stride + at, mask=there, other=0.0).to(tl.float32)
    if OFFSET:
        vector += tl.load(offset + image.to(tl.int64) * offset_stride + at, mask=there, other=0.0).to(tl.float32)
    return vector[None, :]


@triton.jit
def norm_forward(
    x,
    branch,
    modulation,
    offset,
    total,
    y,
    mean,
    inverse,
    tokens,
    channels,
    modulation_stride,
    offset_stride,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens of one image. RESIDUAL: x + gate · branch, to `total`. NORM: the modulated norm of that, to `y`."""
    tiles = tl.cdiv(tokens, ROWS)
    image = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (channel < channels)[None, :]
    row = image.to(tl.int64) * tokens + token
    at = row[:, None] * channels + channel[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        added = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        gate = _vector(modulation, offset, 0, image, modulation_stride, offset_stride, channel, channels, OFFSET)
        value += gate * added
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the norm is of what the next layers read
    if NORM:
        m = tl.sum(value, 1) / channels
        centred = tl.where(inside, value - m[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + EPS)
        shift = _vector(
            modulation, offset, RESIDUAL, image, modulation_stride, offset_stride, channel, channels, OFFSET
        )
        scale = _vector(
            modulation, offset, RESIDUAL + 1, image, modulation_stride, offset_stride, channel, channels, OFFSET
        )
        result = centred * r[:, None] * (1.0 + scale) + shift
        tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
        tl.store(mean + row, m, mask=token < tokens)
        tl.store(inverse + row, r, mask=token < tokens)


@triton.jit
def norm_backward(
    total,
    branch,
    modulation,
    offset,
    mean,
    inverse,
    grad_total,
    grad_y,
    grad_x,
    grad_branch,
    sums,
    tokens,
    channels,
    slices,
    slice_tokens,
    modulation_stride,
    offset_stride,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A slice of one image, ROWS tokens at a time; its sums in the order gate, shift, scale, those that there are.

    Without RESIDUAL there is no grad_total, and `total` is x. Without NORM nothing changes grad_total on its way to x,
    so no grad_x is written.
    """
    image = tl.program_id(0) // slices
    first = tl.program_id(0) % slices * slice_tokens
    last = tl.minimum(first + slice_tokens, tokens)
    channel = tl.arange(0, BLOCK)
    there = channel < channels
    sum_gate = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_shift = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_scale = tl.zeros((ROWS, BLOCK), tl.float32)
    if RESIDUAL:
        g = _vector(modulation, offset, 0, image, modulation_stride, offset_stride, channel, channels, OFFSET)
    if NORM:
        factor = 1.0 + _vector(
            modulation, offset, RESIDUAL + 1, image, modulation_stride, offset_stride, channel, channels, OFFSET
        )
    for start in range(first, last, ROWS):
        token = start + tl.arange(0, ROWS)
        inside = (token < last)[:, None] & there[None, :]
        row = image.to(tl.int64) * tokens + token
        at = row[:, None] * channels + channel[None, :]
        grad = tl.zeros((ROWS, BLOCK), tl.float32)
        if RESIDUAL:
            added = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            grad += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
            m = tl.load(mean + row, mask=token < last, other=0.0)
            r = tl.load(inverse + row, mask=token < last, other=0.0)
            normal = tl.where(inside, (value - m[:, None]) * r[:, None], 0.0)
            sum_shift += dy
            sum_scale += dy * normal
            dy *= factor
            along = tl.sum(dy * normal, 1) / channels
            grad += r[:, None] * (dy - (tl.sum(dy, 1) / channels)[:, None] - normal * along[:, None])
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
        if RESIDUAL:
            sum_gate += grad * added
            tl.store(grad_branch + at, (grad * g).to(grad_branch.dtype.element_ty), mask=inside)
    sums += tl.program_id(0).to(tl.int64) * ((RESIDUAL + 2 * NORM) * channels) + channel
    if RESIDUAL:
        tl.store(sums, tl.sum(sum_gate, 0), mask=there)
        sums += channels
    if NORM:
        tl.store(sums, tl.sum(sum_shift, 0), mask=there)
        tl.store(sums + channels, tl.sum(sum_scale, 0), mask=there)


@on_its_device
def forward(
    x: Tensor, branch: Tensor | None, modulation: Tensor, offset: Tensor | None, norm: bool
) -> tuple[Any, Any, Any, Any]:
    """The total, its modulated norm, mean and 1 / deviation of each token, float32; None where it is not asked for.

    Args:
        x: (B, ..., C).
        branch: What is added to x, of its shape; None for a norm of x.
        modulation: Gate, if there is a branch, then shift and scale, if there is a norm, (B, n, C).
        offset: What is added to the modulation, of its shape.
        norm: Whether there is a norm.
    """
    x, modulation, offset = x.contiguous(), _side_by_side(modulation), _side_by_side(offset)
    batch, channels = x.shape[0], x.shape[-1]
    tokens = x.numel() // (batch * channels)
    total = y = mean = inverse = None
    dtype = torch.promote_types(x.dtype, modulation.dtype)
    if offset is not None:
        dtype = torch.promote_types(dtype, offset.dtype)
    if branch is not None:
        branch, dtype = branch.contiguous(), torch.promote_types(dtype, branch.dtype)
        total = torch.empty_like(x, dtype=dtype)
    if norm:
        y = torch.empty_like(x, dtype=dtype)
        mean, inverse = (x.new_empty((batch, tokens), dtype=torch.float32) for _ in range(2))
    block = triton.next_power_of_2(channels)
    rows = max(1, FORWARD_TILE // block)
    wrap_triton(norm_forward)[(batch * triton.cdiv(tokens, rows),)](
        x,
        branch,
        modulation,
        offset,
        total,
        y,
        mean,
        inverse,
        tokens,
        channels,
        modulation.stride(0),
        0 if offset is None else offset.stride(0),
        RESIDUAL=branch is not None,
        NORM=norm,
        OFFSET=offset is not None,
        EPS=EPSILON,
        ROWS=rows,
        BLOCK=block,
        num_warps=WARPS,
    )
    return total, y, mean, inverse


@on_its_device
def backward(
    grad_total: Tensor | None,
    grad_y: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    modulation: Tensor,
    offset: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> tuple[Any, Any, Tensor]:
    """Gradients of x (in `dtype`; None for a residual alone, whose grad_total it is), branch and modulation.

    The last are sums, (B, n, C) in float32, and those of the offset, too.

    Args:
        grad_total, grad_y: Gradients of what :func:`forward` returned; the first is there with a branch, the second
            with a norm.
        total: What was normalised; without a norm any map of that shape.
        branch, modulation, offset: As in :func:`forward`.
        statistics: Mean and 1 / deviation, if there is a norm.
    """
    total, modulation, offset = total.contiguous(), _side_by_side(modulation), _side_by_side(offset)
    batch, channels = total.shape[0], total.shape[-1]
    tokens = total.numel() // (batch * channels)
    mean = inverse = grad_x = grad_branch = None
    if branch is not None and grad_total is not None:
        branch, grad_total = branch.contiguous(), grad_total.contiguous()
        grad_branch = torch.empty_like(branch)
    if statistics is not None and grad_y is not None:
        mean, inverse = statistics
        grad_y = grad_y.contiguous()
        grad_x = torch.empty_like(total, dtype=dtype)
    slices = max(1, min(SLICES // batch, triton.cdiv(tokens, SLICE_TOKENS)))
    slice_tokens = triton.cdiv(tokens, slices)
    sums = total.new_empty((batch, slices, modulation.shape[1], channels), dtype=torch.float32)
    block = triton.next_power_of_2(channels)
    wrap_triton(norm_backward)[(batch * slices,)](
        total,
        branch,
        modulation,
        offset,
        mean,
        inverse,
        grad_total,
        grad_y,
        grad_x,
        grad_branch,
        sums,
        tokens,
        channels,
        slices,
        slice_tokens,
        modulation.stride(0),
        0 if offset is None else offset.stride(0),
        RESIDUAL=branch is not None,
        NORM=statistics is not None,
        OFFSET=offset is not None,
        ROWS=max(1, BACKWARD_TILE // block),
        BLOCK=block,
        num_warps=WARPS,
    )
    return grad_x, grad_branch, sums.sum(1)


@overload
def _side_by_side(vectors: Tensor) -> Tensor: ...
@overload
def _side_by_side(vectors: None) -> None: ...
def _side_by_side(vectors: Tensor | None) -> Tensor | None:
    """Vectors (B, n, C) of an image side by side, any distance between two images'."""
    if vectors is None:
        return None
    _, count, channels = vectors.shape
    together = vectors.stride(2) == 1 and (count == 1 or vectors.stride(1) == channels)
    return vectors if together else vectors.contiguous()
