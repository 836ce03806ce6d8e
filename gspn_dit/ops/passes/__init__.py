"""What a block computes beside products and scans, in one pass over its map each: Triton kernels for NVIDIA GPUs.

`gspn_dit.layers.fused` has the same functions as plain compositions, which define them, and calls these where
:func:`take` says so. Importing this package is quick; Triton is imported where a GPU's tensors arrive, and tried there
once: what it lacks shows at its first launch. A program saved by torch.export on a GPU needs this before it is loaded:

    import gspn_dit.ops.passes.operators

A tile is a part of a map that a program of a kernel holds in registers; a slice, consecutive tokens of one image whose
sums one program adds up. Kernels read and write bfloat16, float16 or float32, and compute in float32.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from gspn_dit.errors import warn

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


def take(x: Tensor, *modulations: Tensor | Sequence[Tensor] | None) -> bool:
    """Whether the kernels run on a map (..., C): on NVIDIA GPUs since Ampere, where Triton works, unless turned off.

    Under torch.compile on maps of any size, else on those of at least SMALLEST_EAGER elements. A modulation, if it is
    given, must be one tensor of vectors for the images of x.
    """
    return (
        x.device.type == "cuda"
        and WANTED
        and x.dtype in DTYPES
        and x.dim() > 0
        and 0 < x.shape[-1] <= MOST_CHANNELS
        and x.numel() > 0
        and (torch.compiler.is_compiling() or x.numel() >= SMALLEST_EAGER)
        and all(given is None or are_vectors(given, x) for given in modulations)
        and runs_kernels(x.device)
    )


def are_vectors(modulation: Tensor | Sequence[Tensor], x: Tensor) -> bool:
    """Whether a modulation is some vectors of channels for each image of x (B, ..., C), or the same for all.

    It has a dimension more than x: B or 1, then ones, then the number of vectors, then C.
    """
    return (
        isinstance(modulation, Tensor)
        and modulation.dim() == x.dim() + 1 > 2
        and modulation.shape[0] in (1, x.shape[0])
        and modulation.shape[-1] == x.shape[-1]
        and all(size == 1 for size in modulation.shape[1:-2])
    )


@torch.compiler.assume_constant_result
def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on a GPU; torch.compile asks once and does not look inside."""
    if not (
        HAS_TRITON
        and torch.version.hip is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= OLDEST
    ):
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _works:
        if torch.cuda.is_current_stream_capturing():
            return False  # a graph's recording allows no waiting for the GPU; rehearsals come before, and ask
        reason = fault_of(torch.device("cuda", index))
        _works[index] = reason is None
        if reason is not None:
            warn(
                f"no Triton kernels on cuda:{index} ({reason}); what they compute is left to torch, which takes longer"
            )
    return _works[index]


_works: dict[int, bool] = {}  # of the GPUs that were asked about


def fault_of(device: torch.device) -> str | None:
    """Why the smallest pass does not run on a GPU, or what is wrong with its result; None if nothing is.

    It runs in a thread of its own. Whoever asks may be traced by torch.compile or torch.export, under a mode that makes
    no real tensors or under autocast; all of these are a thread's.
    """
    said: list[str | None] = []

    def ask() -> None:
        try:
            said.append(None if is_right(device) else "a wrong result")
        except Exception as error:  # of whatever library; the compositions need none of them
            said.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return said[0]


def is_right(device: torch.device) -> bool:
    """Launch the squared ReLU on a few elements, and compare it with its composition."""
    from gspn_dit.ops.passes import operators

    with torch.no_grad():
        x = torch.arange(-4.0, 4.0, dtype=torch.float32, device=device)
        return torch.equal(operators.squared_relu(x), x.relu() * x.relu())


def on_its_device(launch: Callable[P, T]) -> Callable[P, T]:
    """A function that launches kernels, on the GPU of its first tensor: Triton launches on the current one."""

    @functools.wraps(launch)
    def guarded(*args: P.args, **named: P.kwargs) -> T:
        if torch.cuda.device_count() < 2:
            return launch(*args, **named)
        with torch.cuda.device_of(next(each for each in args if isinstance(each, Tensor))):
            return launch(*args, **named)

    return guarded
