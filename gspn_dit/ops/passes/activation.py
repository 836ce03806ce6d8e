"""Kernels of the squared ReLU, y = max(x, 0)² and dx = 2 max(x, 0) dy, and how they are launched."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from gspn_dit.ops.passes import on_its_device

BLOCK = 2048  # elements of a program
WARPS = 4


@triton.jit
def squared_relu_forward(x, y, count, BLOCK: tl.constexpr):
    """BLOCK elements; NaN stays NaN."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    value = tl.where(value < 0.0, 0.0, value)
    tl.store(y + at, (value * value).to(y.dtype.element_ty), mask=at < count)


@triton.jit
def squared_relu_backward(x, grad, grad_x, count, BLOCK: tl.constexpr):
    """BLOCK elements of the gradient."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    value = tl.where(value < 0.0, 0.0, value)
    result = 2.0 * value * tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=at < count)


@on_its_device
def forward(x: Tensor) -> Tensor:
    """max(x, 0)² of a tensor of any shape."""
    x = x.contiguous()
    y = torch.empty_like(x)
    wrap_triton(squared_relu_forward)[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return y


@on_its_device
def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x."""
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x)
    wrap_triton(squared_relu_backward)[(triton.cdiv(x.numel(), BLOCK),)](
        x, grad, grad_x, x.numel(), BLOCK=BLOCK, num_warps=WARPS
    )
    return grad_x
