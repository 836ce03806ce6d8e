"""The kernels behind `propagate`: which there are, and whether they run here or why not."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gspn_dit.errors import InputError
from gspn_dit.ops.build import architectures, built
from gspn_dit.ops.reference import DIRECTIONS, propagate_reference


class Kernel(Protocol):
    """One implementation. `chunk` 0 is global; `directions` are indices into DIRECTIONS."""

    def forward(
        self, x: Tensor, gates: Tensor, lam: Tensor, out: Tensor | None, chunk: int, directions: Sequence[int]
    ) -> Tensor: ...

    def backward(
        self, grad: Tensor, x: Tensor, gates: Tensor, lam: Tensor, out: Tensor | None, chunk: int,
        directions: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip


class Status(NamedTuple):
    """Whether a backend runs on this machine, and what there is to know about it (if not: why, and the remedy)."""

    available: bool
    detail: str


class ReferenceKernel:
    """Plain PyTorch, on any device."""

    def forward(self, x, gates, lam, out, chunk, directions):
        names = [list(DIRECTIONS)[code] for code in directions]
        return torch.empty_like(x).copy_(propagate_reference(x, gates, lam, out, chunk or None, names))

    def backward(self, grad, x, gates, lam, out, chunk, directions):
        # Inside a custom op autograd does not record, torch.func does.
        inputs = (x, gates, lam) if out is None else (x, gates, lam, out)
        grads = torch.func.vjp(
            lambda x, gates, lam, out=None: self.forward(x, gates, lam, out, chunk, directions), *inputs
        )[1](grad)
        grad_x, *rest = grads if out is not None else (*grads, x.new_empty(0))
        # every gradient is laid out as its tensor is
        return tuple(
            torch.empty_like(like).copy_(g) if like is not None else g
            for like, g in zip((x, gates, lam, out), (grad_x, *rest), strict=True)
        )


class CpuKernel:
    """C++ of csrc/, vectorised over channels; float16 goes through float32 copies."""

    def __init__(self, library: Path):
        if not hasattr(torch.ops.gspn_dit_cpu, "propagate"):  # building it has loaded it
            torch.ops.load_library(library)

    def forward(self, x, gates, lam, out, chunk, directions):
        if x.dtype == torch.float16:
            return self.forward(*_floats(x, gates, lam, out), chunk, directions).half()
        return torch.ops.gspn_dit_cpu.propagate(x, gates, lam, out, chunk, directions)

    def backward(self, grad, x, gates, lam, out, chunk, directions):
        if x.dtype == torch.float16:
            grads = self.backward(*_floats(grad, x, gates, lam, out), chunk, directions)
            return tuple(g.half() for g in grads)
        return torch.ops.gspn_dit_cpu.propagate_backward(grad, x, gates, lam, out, chunk, directions)


def _floats(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]


class CudaKernel:
    """CUDA of csrc/, float32, bfloat16 and float16, on the current stream of the tensors' device."""

    def __init__(self, library: Path):
        if not hasattr(torch.ops.gspn_dit_cuda, "propagate"):
            torch.ops.load_library(library)

    def forward(self, x, gates, lam, out, chunk, directions):
        return torch.ops.gspn_dit_cuda.propagate(x, gates, lam, out, chunk, directions)

    def backward(self, grad, x, gates, lam, out, chunk, directions):
        return torch.ops.gspn_dit_cuda.propagate_backward(grad, x, gates, lam, out, chunk, directions)


BACKENDS = ("reference", "cpu", "cuda")


def status(name: str) -> Status:
    """Whether a backend runs here; the first call for a compiled one builds it."""
    if name == "reference":
        return Status(True, "plain PyTorch, any device")
    return _compiled(name)[1]


def kernel(name: str, device: torch.device) -> Kernel:
    """The kernel of that name, or for "" the best for the device. Raises :class:`InputError` if it can't run there."""
    if name == "reference":
        return _reference
    if name and name != device.type:
        raise InputError(f"backend={name!r} with tensors on {device}: move them, or leave the backend out")
    if device.type in ("cpu", "cuda"):
        compiled, state = _compiled(device.type)
        if compiled is not None:
            return compiled
        if name:
            raise InputError(f"backend={name!r} is not available: {state.detail}")
    _warn_reference(device.type)
    return _reference


_reference = ReferenceKernel()


@functools.cache
def _warn_reference(device_type: str) -> None:
    compiled = device_type in ("cpu", "cuda")
    cause = status(device_type).detail if compiled else f"there is no kernel for {device_type} tensors"
    warnings.warn(f"gspn_dit runs on the reference operator, which is slow: {cause}", stacklevel=2)


@functools.cache
def _compiled(name: str) -> tuple[Kernel | None, Status]:
    try:
        if name == "cpu":
            library = built("cpu")
            return CpuKernel(library), Status(True, f"C++, {torch.get_num_threads()} threads, {library}")
        if not torch.cuda.is_available():
            return None, Status(False, "torch sees no CUDA device")
        library = built("cuda")
        return CudaKernel(library), Status(True, f"CUDA, for {', '.join(architectures())}, {library}")
    except Exception as error:  # whatever goes wrong in a build, the reference still works
        return None, Status(False, str(error))
