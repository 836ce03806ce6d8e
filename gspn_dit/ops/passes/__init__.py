"""What a block computes beside products and scans, in one pass over its map each: Triton kernels for NVIDIA GPUs.

`gspn_dit.layers.fused` has the same functions as plain compositions, which define them, and calls these where
:func:`take` says so. Importing this package is quick; Triton is imported where a GPU's tensors arrive. A program saved
by torch.export on a GPU needs this before it is loaded:

    import gspn_dit.ops.passes.operators

A tile is a part of a map that a program of a kernel holds in registers; a slice, consecutive tokens of one image whose
sums one program adds up. Kernels read and write bfloat16, float16 or float32, and compute in float32.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHANNELS = 8192  # a program holds a token's channels in registers
OLDEST = (8, 0)  # compute capability with conversions from and to bfloat16
# Uncompiled, a smaller map waits for the host, and an operator of Python's takes the host longer than three of C++'s.
SMALLEST_EAGER = 2**22  # elements

# GSPN_DIT_FUSED=0 turns the passes off, to find out whether a fault is theirs.
WANTED = os.environ.get("GSPN_DIT_FUSED", "1") != "0"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def take(x: Tensor) -> bool:
    """Whether the kernels run on a map (..., C): on NVIDIA GPUs since Ampere, where Triton is, unless turned off.

    Under torch.compile on maps of any size, else on those of at least SMALLEST_EAGER elements.
    """
    return (
        x.device.type == "cuda"
        and WANTED
        and x.dtype in DTYPES
        and 0 < x.shape[-1] <= MOST_CHANNELS
        and x.numel() > 0
        and (torch.compiler.is_compiling() or x.numel() >= SMALLEST_EAGER)
        and runs_kernels(x.device)
    )


@torch.compiler.assume_constant_result
def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on a GPU; torch.compile asks once and does not look inside."""
    return (
        HAS_TRITON
        and torch.version.hip is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= OLDEST
    )


def on_its_device(launch: Callable[P, T]) -> Callable[P, T]:
    """A function that launches kernels, on the GPU of its first tensor: Triton launches on the current one."""

    @functools.wraps(launch)
    def guarded(*args: P.args, **named: P.kwargs) -> T:
        if torch.cuda.device_count() < 2:
            return launch(*args, **named)
        with torch.cuda.device_of(next(each for each in args if isinstance(each, Tensor))):
            return launch(*args, **named)

    return guarded
