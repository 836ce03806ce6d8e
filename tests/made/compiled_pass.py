"""The Triton kernels of `gspn_dit.ops.passes` as machine code, compiled where no GPU is."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gspn_dit.ops.passes import activation, convolution, norm

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MAP, SUMS, COUNT = "*bf16", "*fp32", "i32"  # types of arguments: maps and vectors, what is added up, numbers


@dataclass
class Compiled:
    """What a kernel became: its threads, registers and spilled bytes of each, and global accesses by width in bits."""

    threads: int
    registers: int
    spilled: int
    loads: dict[int, int]
    stores: dict[int, int]


def kernels_of_a_block(channels: int, capability: int, folder: Path) -> dict[str, Compiled]:
    """All passes of a block over bfloat16 maps of 16 × 16 tokens, forward and backward, by name."""
    block = triton.next_power_of_2(channels)
    norms = dict.fromkeys(("tokens", "channels", "modulation_stride", "offset_stride"), COUNT) | dict(OFFSET=True)
    forward = norms | dict(
        dict.fromkeys(("x", "branch", "modulation", "offset", "total", "y"), MAP),
        mean=SUMS,
        inverse=SUMS,
        RESIDUAL=True,
        NORM=True,
        EPS=norm.EPSILON,
        ROWS=max(1, norm.FORWARD_TILE // block),
        BLOCK=block,
    )
    backward = norms | dict(
        dict.fromkeys(
            ("total", "branch", "modulation", "offset", "grad_total", "grad_y", "grad_x", "grad_branch"),
            MAP,
        ),
        mean=SUMS,
        inverse=SUMS,
        sums=SUMS,
        slices=COUNT,
        slice_tokens=COUNT,
        RESIDUAL=True,
        NORM=True,
        ROWS=max(1, norm.BACKWARD_TILE // block),
        BLOCK=block,
    )
    filters = dict(height=COUNT, width=COUNT, channels=COUNT, COLUMNS=16, CHANNELS=convolution.CHANNELS)
    conv = filters | dict(x=MAP, weight=MAP, bias=MAP, y=MAP, TURNED=False, ROWS=convolution.ROWS)
    weights = filters | dict(x=MAP, grad=MAP, sums=SUMS, rows=COUNT, rows_each=COUNT)
    elements = dict(x=MAP, count=COUNT, BLOCK=activation.BLOCK)
    no_residual = dict(RESIDUAL=False, branch=None)
    no_norm = dict(NORM=False, mean=None, inverse=None)
    calls: dict[str, tuple[Any, dict[str, Any], int]] = {
        "gated_residual_norm": (norm.norm_forward, forward, norm.WARPS),
        "modulated_norm": (norm.norm_forward, forward | no_residual | dict(total=None), norm.WARPS),
        "gated_residual": (norm.norm_forward, forward | no_norm | dict(y=None), norm.WARPS),
        "gated_residual_norm backward": (norm.norm_backward, backward, norm.WARPS),
        "modulated_norm backward": (
            norm.norm_backward,
            backward | no_residual | dict(grad_total=None, grad_branch=None),
            norm.WARPS,
        ),
        "gated_residual backward": (
            norm.norm_backward,
            backward | no_norm | dict(grad_y=None, grad_x=None),
            norm.WARPS,
        ),
        "squared_relu": (activation.squared_relu_forward, elements | dict(y=MAP), activation.WARPS),
        "squared_relu backward": (
            activation.squared_relu_backward,
            elements | dict(grad=MAP, grad_x=MAP),
            activation.WARPS,
        ),
        "depthwise_conv": (convolution.conv_forward, conv, convolution.WARPS),
        "depthwise_conv backward": (
            convolution.conv_forward,
            conv | dict(bias=None, TURNED=True),
            convolution.WARPS,
        ),
        "depthwise_conv weights": (convolution.conv_weight, weights, convolution.WARPS),
    }
    return {name: compiled(*call, capability, folder) for name, call in calls.items()}


def compiled(kernel: Any, arguments: dict[str, Any], warps: int, capability: int, folder: Path) -> Compiled:
    """A kernel for arguments that are each a type or a constant; None is a pointer that is absent.

    All pointers and numbers are multiples of 16, as they are in the named sizes.
    """
    names = kernel.arg_names
    assert set(arguments) == set(names), set(arguments) ^ set(names)
    typed = {name for name in names if isinstance(arguments[name], str)}
    source = ASTSource(
        kernel,
        {name: arguments[name] if name in typed else "constexpr" for name in names},
        {(i,): arguments[name] for i, name in enumerate(names) if name not in typed},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in typed},
    )
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    binary = folder / "kernel.cubin"
    binary.write_bytes(code.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout)}
    ptx = code.asm["ptx"]
    return Compiled(32 * warps, used["REG"], used["STACK"] + used["LOCAL"], accesses(ptx, "ld"), accesses(ptx, "st"))


def accesses(ptx: str, kind: str) -> dict[int, int]:
    """Global loads ("ld") or stores ("st") by their width in bits."""
    widths: dict[int, int] = {}
    for vector, bits in re.findall(rf"\b{kind}\.global(?:\.[a-z0-9_:]+)*?(?:\.v([24]))?\.[bfu](\d+)", ptx):
        width = int(vector or 1) * int(bits)
        widths[width] = widths.get(width, 0) + 1
    return widths
