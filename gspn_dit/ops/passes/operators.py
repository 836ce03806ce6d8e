"""The passes as operators of torch, `torch.ops.gspn_dit.*`, with gradients; importing this needs Triton.

torch.compile sees the kernels inside, torch.export and autocast see operators. `gspn_dit.layers.fused` says what each
of them computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op
from torch.utils.flop_counter import register_flop_formula

from gspn_dit.ops.passes import activation, convolution, norm


@triton_op("gspn_dit::modulated_norm", mutates_args=())
def modulated_norm(x: Tensor, modulation: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The modulated norm of x (B, ..., C), and the mean and 1 / deviation of each token (B, N).

    Shift and scale are (B, 2, C), and so is the offset that is added to them.
    """
    _, y, mean, inverse = norm.forward(x, None, modulation, offset, norm=True)
    return y, mean, inverse


@triton_op("gspn_dit::modulated_norm_backward", mutates_args=())
def modulated_norm_backward(
    grad: Tensor, x: Tensor, modulation: Tensor, offset: Tensor | None, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of shift and scale, (B, 2, C) in float32."""
    grad_x, _, sums = norm.backward(None, grad, x, None, modulation, offset, (mean, inverse), x.dtype)
    return grad_x, sums


def _save_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, mean, inverse = output
    ctx.save_for_backward(*inputs, mean, inverse)
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx: Any, grad: Tensor | None, *unused: None) -> tuple:
    if grad is None:
        return None, None, None
    x, modulation, offset, mean, inverse = ctx.saved_tensors
    grad_x, sums = modulated_norm_backward(grad, x, modulation, offset, mean, inverse)
    return grad_x, *_of_both(sums, modulation, offset)


def _of_both(sums: Tensor, modulation: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of a modulation and its offset."""
    return sums.to(modulation.dtype), None if offset is None else sums.to(offset.dtype)


modulated_norm.register_autograd(_norm_gradients, setup_context=_save_norm)


@triton_op("gspn_dit::gated_residual_norm", mutates_args=())
def gated_residual_norm(
    x: Tensor, branch: Tensor, modulation: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + gate · branch, then as :func:`modulated_norm` of that; gate, shift and scale are (B, 3, C)."""
    return norm.forward(x, branch, modulation, offset, norm=True)


@triton_op("gspn_dit::gated_residual_norm_backward", mutates_args=())
def gated_residual_norm_backward(
    grad_total: Tensor,
    grad: Tensor,
    total: Tensor,
    branch: Tensor,
    modulation: Tensor,
    offset: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, in `dtype`, and of the branch, and those of gate, shift and scale, (B, 3, C) in float32."""
    return norm.backward(grad_total, grad, total, branch, modulation, offset, (mean, inverse), dtype)


def _save_residual_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    (x, *others), (total, _, mean, inverse) = inputs, output
    ctx.save_for_backward(total, *others, mean, inverse)
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)


def _residual_norm_gradients(ctx: Any, grad_total: Tensor | None, grad: Tensor | None, *unused: None) -> tuple:
    total, branch, modulation, offset, mean, inverse = ctx.saved_tensors
    grad_total = torch.zeros_like(total) if grad_total is None else grad_total
    grad = torch.zeros_like(total) if grad is None else grad
    grad_x, grad_branch, sums = gated_residual_norm_backward(
        grad_total, grad, total, branch, modulation, offset, mean, inverse, ctx.dtype
    )
    return grad_x, grad_branch, *_of_both(sums, modulation, offset)


gated_residual_norm.register_autograd(_residual_norm_gradients, setup_context=_save_residual_norm)


@triton_op("gspn_dit::gated_residual", mutates_args=())
def gated_residual(x: Tensor, branch: Tensor, modulation: Tensor, offset: Tensor | None = None) -> Tensor:
    """x + gate · branch of maps (B, ..., C); the gate and the offset that is added to it are (B, 1, C)."""
    return norm.forward(x, branch, modulation, offset, norm=False)[0]


@triton_op("gspn_dit::gated_residual_backward", mutates_args=())
def gated_residual_backward(
    grad: Tensor, branch: Tensor, modulation: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of the branch, and of the gate, (B, 1, C) in float32; x has that of the result."""
    _, grad_branch, sums = norm.backward(grad, None, grad, branch, modulation, offset, None, grad.dtype)
    return grad_branch, sums


def _save_residual(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *others = inputs
    ctx.save_for_backward(*others)
    ctx.dtype = x.dtype


def _residual_gradients(ctx: Any, grad: Tensor) -> tuple:
    branch, modulation, offset = ctx.saved_tensors
    grad_branch, sums = gated_residual_backward(grad, branch, modulation, offset)
    return grad.to(ctx.dtype), grad_branch, *_of_both(sums, modulation, offset)


gated_residual.register_autograd(_residual_gradients, setup_context=_save_residual)


@triton_op("gspn_dit::squared_relu", mutates_args=())
def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    return activation.forward(x)


@triton_op("gspn_dit::squared_relu_backward", mutates_args=())
def squared_relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """2 max(x, 0) · grad."""
    return activation.backward(grad, x)


def _save_input(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _squared_relu_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return squared_relu_backward(grad, *ctx.saved_tensors)


squared_relu.register_autograd(_squared_relu_gradient, setup_context=_save_input)


@triton_op("gspn_dit::depthwise_conv", mutates_args=())
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The map (B, H, W, C) filtered by weights (C, 1, 3, 3), with its bias (C,)."""
    return convolution.forward(x, weight, bias)


@triton_op("gspn_dit::depthwise_conv_input_backward", mutates_args=())
def depthwise_conv_input_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the map."""
    return convolution.forward(grad, weight, None, turned=True)


@triton_op("gspn_dit::depthwise_conv_weight_backward", mutates_args=())
def depthwise_conv_weight_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the weights, and of the bias, in float32."""
    return convolution.weight_backward(grad, x, weight)


def _save_conv(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv_gradients(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = depthwise_conv_input_backward(grad, weight)
    if any(ctx.needs_input_grad[1:]):
        grad_weight, grad_bias = depthwise_conv_weight_backward(grad, x, weight)
        grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias


depthwise_conv.register_autograd(_conv_gradients, setup_context=_save_conv)


@register_flop_formula([torch.ops.gspn_dit.depthwise_conv, torch.ops.gspn_dit.depthwise_conv_input_backward])
def _conv_flops(map_shape: Any, *others: Any, **options: Any) -> int:
    """Two for each of the nine taps, as torch counts a convolution's."""
    batch, height, width, channels = map_shape
    return 18 * batch * height * width * channels


@register_flop_formula(torch.ops.gspn_dit.depthwise_conv_weight_backward)
def _conv_weight_flops(grad_shape: Any, *others: Any, **options: Any) -> int:
    return _conv_flops(grad_shape)
