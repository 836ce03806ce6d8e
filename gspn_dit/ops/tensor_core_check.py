"""Do the kernels on tensor cores compute what the reference does, on the GPU at hand?

Tests run these kernels in an emulation, which shows neither a compiler's mistake nor a race. So a process compares them
with the reference once per device, before it first uses them. It takes small maps, all gradients, and about a
second.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from gspn_dit.ops.backend import OPERANDS, Call, FusesTail
from gspn_dit.ops.reference import Reference
from gspn_dit.ops.tail import EPSILON

VARIABLE = "GSPN_DIT_TENSOR_CORES"  # 0 turns the kernels off
# Of ‖got - want‖ / ‖want‖. In emulation results differ from float64 by 0.002, gradients by up to 0.004; a wrong sign or
# a line left out is 0.1 and more.
TOLERANCE = 0.03


def wanted() -> bool:
    """Whether the environment leaves these kernels on."""
    return os.environ.get(VARIABLE, "1") != "0"


def disagreement(kernel: FusesTail, device: torch.device) -> str | None:
    """What the kernel computes otherwise than the reference, in words; None if nothing.

    Four maps, each with a tail and two groups of 64: a single tile; one that a block has all of forward, and that is
    four tiles backward; one of tiles with edges between them; and one of shifted windows, whose tiles have none.
    """
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        return _disagreement(kernel, device)


def _disagreement(kernel: FusesTail, device: torch.device) -> str | None:
    for height, width, window, shift in ((16, 16, 0, 0), (18, 20, 0, 0), (18, 34, 0, 0), (18, 20, 5, 2)):
        call, direct, grad = _example(height, width, device)
        call = call._replace(window=window, shift=shift)
        y, inverse_rms = kernel.forward_with_tail(call, direct)
        got = y, *kernel.backward_with_tail(grad, y, inverse_rms, call, direct)
        want = _by_reference(call, direct, grad)
        for name, one, other in zip(("y", *OPERANDS, "direct"), got, want, strict=True):
            distance = ((one.float() - other).norm() / other.norm().clamp_min(1e-9)).item() if one.numel() else 0.0
            if not distance < TOLERANCE:  # NaN is a disagreement, too
                of = name if name == "y" else f"the gradient of {name}"
                where = f"on {height} × {width} tokens{f' in windows of {window}' if window else ''}"
                return f"{where} {of} is {distance:.2g} of its norm away from the reference's"
    return None


def _example(height: int, width: int, device: torch.device) -> tuple[Call, Tensor, Tensor]:
    """Random operands of two groups of 64 channels, the same in every process, d and the gradient of y."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    x, grad = draw(1, height, width, 128), draw(1, height, width, 128)
    gates, input_gate = draw(1, height, width, 4, 3, 2), draw(1, height, width, 4, 2)
    decay = draw(4, 128, dtype=torch.float32).sigmoid()
    scale, direct = draw(4, 128, dtype=torch.float32), draw(128, dtype=torch.float32)
    return Call(x, gates, input_gate, decay=decay, scale=scale), direct, grad


def _by_reference(call: Call, direct: Tensor, grad: Tensor) -> list[Tensor]:
    """y and the gradients, in float32; empty for the operand that is None."""
    present = {name: each.float() for name, each in zip(OPERANDS, call.operands, strict=True) if each is not None}

    def compute(operands: dict[str, Any], d: Tensor) -> Tensor:
        exact = call._replace(**operands)
        scanned = Reference().forward(exact)
        groups = scanned.unflatten(-1, (call.input_gate.shape[-1], -1))
        normed = groups * (groups.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        return normed.flatten(-2) + d * exact.x

    y, backward, *_ = torch.func.vjp(compute, present, direct)
    of_operands, of_direct = backward(grad.float())
    return [y, *(of_operands.get(name, y.new_empty(0)) for name in OPERANDS), of_direct]
