"""Kernels of the depthwise 3 × 3 convolution of a channels-last map, and how they are launched.

    y[h, w] = bias + Σ weight[i, j] x[h + i - 1, w + j - 1]    i, j = 0 … 2, zero outside the map, in every channel

The gradient of x is the same sum over dy with the weights turned by half a turn. The gradient of the weights is a sum
over all tokens: a program adds up some rows of maps, and `Tensor.sum` the programs, so the order is always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from gspn_dit.ops.passes import on_its_device

ROWS = 8  # of the map, computed by one program, which reads two more
CHANNELS = 64  # of a program: with 16 columns 8 elements a thread, whose nine weights stay in registers
TILE = 1024  # elements: columns times channels
WARPS = 4
SUMMANDS = 64  # programs that share the sums of a channel


@triton.jit
def _row(x, row, column, channel, height, width, channels):
    """Tokens of one row of an image, (COLUMNS, CHANNELS) in float32, zero outside the map."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = column[:, None] * channels + channel[None, :]
    start = x + row.to(tl.int64) * width * channels  # a map may have more elements than 32 bits count
    return tl.load(start + at, mask=inside[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _tap(weight, tap: tl.constexpr, channel, channels, TURNED: tl.constexpr):
    """One of the nine weights of each channel, (1, CHANNELS) in float32."""
    pointer = weight + channel * 9 + (8 - tap if TURNED else tap)
    return tl.load(pointer, mask=channel < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def conv_forward(
    x,
    weight,
    bias,
    y,
    height,
    width,
    channels,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """ROWS rows of COLUMNS columns of one image. Every row is read once for the three rows that it adds to."""
    strips, pieces = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    image = (tl.program_id(0) // (strips * pieces)).to(tl.int64)
    first = tl.program_id(0) // pieces % strips * ROWS
    column = tl.program_id(0) % pieces * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x += image * height * width * channels
    y += image * height * width * channels
    w00 = _tap(weight, 0, channel, channels, TURNED)
    w01 = _tap(weight, 1, channel, channels, TURNED)
    w02 = _tap(weight, 2, channel, channels, TURNED)
    w10 = _tap(weight, 3, channel, channels, TURNED)
    w11 = _tap(weight, 4, channel, channels, TURNED)
    w12 = _tap(weight, 5, channel, channels, TURNED)
    w20 = _tap(weight, 6, channel, channels, TURNED)
    w21 = _tap(weight, 7, channel, channels, TURNED)
    w22 = _tap(weight, 8, channel, channels, TURNED)
    empty = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    if bias is not None:
        empty += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    present = (column < width)[:, None] & (channel < channels)[None, :]
    above, here = empty, empty  # sums of the rows above the one read, and of that one, so far
    for i in tl.static_range(ROWS + 2):
        row = first + i - 1
        left = _row(x, row, column - 1, channel, height, width, channels)
        centre = _row(x, row, column, channel, height, width, channels)
        right = _row(x, row, column + 1, channel, height, width, channels)
        if i >= 2:
            done = above + w20 * left + w21 * centre + w22 * right
            at = column[:, None] * channels + channel[None, :]
            start = y + (row - 1).to(tl.int64) * width * channels
            tl.store(start + at, done.to(y.dtype.element_ty), mask=present & (row - 1 < height))
        above = here + w10 * left + w11 * centre + w12 * right
        here = empty + w00 * left + w01 * centre + w02 * right


@triton.jit
def conv_weight(
    x,
    grad,
    sums,
    rows,
    rows_each,
    height,
    width,
    channels,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums over `rows_each` of all images' rows, for the nine weights and the bias of CHANNELS channels."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    s00 = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    s01, s02, s10, s11, s12, s20, s21, s22, bias = s00, s00, s00, s00, s00, s00, s00, s00, s00
    first = tl.program_id(0) * rows_each
    for place in range(first, tl.minimum(first + rows_each, rows)):
        image, row = (place // height).to(tl.int64), place % height
        inputs = x + image * height * width * channels
        grads = grad + image * height * width * channels
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            dy = _row(grads, row, column, channel, height, width, channels)
            s00 += dy * _row(inputs, row - 1, column - 1, channel, height, width, channels)
            s01 += dy * _row(inputs, row - 1, column, channel, height, width, channels)
            s02 += dy * _row(inputs, row - 1, column + 1, channel, height, width, channels)
            s10 += dy * _row(inputs, row, column - 1, channel, height, width, channels)
            s11 += dy * _row(inputs, row, column, channel, height, width, channels)
            s12 += dy * _row(inputs, row, column + 1, channel, height, width, channels)
            s20 += dy * _row(inputs, row + 1, column - 1, channel, height, width, channels)
            s21 += dy * _row(inputs, row + 1, column, channel, height, width, channels)
            s22 += dy * _row(inputs, row + 1, column + 1, channel, height, width, channels)
            bias += dy
    there = channel < channels
    sums += tl.program_id(0).to(tl.int64) * (10 * channels) + channel
    tl.store(sums, tl.sum(s00, 0), mask=there)
    tl.store(sums + channels, tl.sum(s01, 0), mask=there)
    tl.store(sums + 2 * channels, tl.sum(s02, 0), mask=there)
    tl.store(sums + 3 * channels, tl.sum(s10, 0), mask=there)
    tl.store(sums + 4 * channels, tl.sum(s11, 0), mask=there)
    tl.store(sums + 5 * channels, tl.sum(s12, 0), mask=there)
    tl.store(sums + 6 * channels, tl.sum(s20, 0), mask=there)
    tl.store(sums + 7 * channels, tl.sum(s21, 0), mask=there)
    tl.store(sums + 8 * channels, tl.sum(s22, 0), mask=there)
    tl.store(sums + 9 * channels, tl.sum(bias, 0), mask=there)


@on_its_device
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool = False) -> Tensor:
    """The map (B, H, W, C) filtered by weights (C, 1, 3, 3), turned by half a turn if so wanted, with its bias (C,)."""
    x, weight = x.contiguous(), weight.contiguous()
    batch, height, width, channels = x.shape
    y = torch.empty_like(x)
    block, columns = _tile(width, channels)
    tiles = batch * triton.cdiv(height, ROWS) * triton.cdiv(width, columns)
    wrap_triton(conv_forward)[(tiles, triton.cdiv(channels, block))](
        x,
        weight,
        bias,
        y,
        height,
        width,
        channels,
        TURNED=turned,
        ROWS=ROWS,
        COLUMNS=columns,
        CHANNELS=block,
        num_warps=WARPS,
    )
    return y


@on_its_device
def weight_backward(grad: Tensor, x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the weights (C, 1, 3, 3), in the dtype of `like`, and of the bias (C,), in float32."""
    grad, x = grad.contiguous(), x.contiguous()
    batch, height, width, channels = x.shape
    block, columns = _tile(width, channels)
    rows_each = triton.cdiv(batch * height, SUMMANDS)
    programs = triton.cdiv(batch * height, rows_each)
    sums = x.new_empty((programs, 10, channels), dtype=torch.float32)
    wrap_triton(conv_weight)[(programs, triton.cdiv(channels, block))](
        x,
        grad,
        sums,
        batch * height,
        rows_each,
        height,
        width,
        channels,
        COLUMNS=columns,
        CHANNELS=block,
        num_warps=WARPS,
    )
    total = sums.sum(0)
    return total[:9].t().contiguous().view(like.shape).to(like.dtype), total[9].clone()


def _tile(width: int, channels: int) -> tuple[int, int]:
    """Channels and columns of a tile: few columns on narrow maps, so that few lie beyond the map's edge."""
    block = min(CHANNELS, triton.next_power_of_2(channels))
    columns = 1
    while columns < width and columns < TILE // block:  # comparisons: torch.compile may leave width open
        columns *= 2
    return block, columns
