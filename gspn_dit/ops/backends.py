"""The kernels behind `propagate`: which there are, and whether they run here or why not."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gspn_dit.errors import InputError, warn
from gspn_dit.ops.build import architectures, built
from gspn_dit.ops.reference import DIRECTIONS, propagate_reference


class Kernel(Protocol):
    """One implementation. `chunk` 0 is global; `directions` are indices into DIRECTIONS."""

    def forward(
        self,
        x: Tensor,
        gates: Tensor,
        lam: Tensor,
        out: Tensor | None,
        decay: Tensor | None,
        scale: Tensor | None,
        chunk: int,
        directions: Sequence[int],
    ) -> Tensor: ...

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        gates: Tensor,
        lam: Tensor,
        out: Tensor | None,
        decay: Tensor | None,
        scale: Tensor | None,
        chunk: int,
        directions: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...


class Status(NamedTuple):
    """Whether a backend runs on this machine, and what there is to know about it (if not: why, and the remedy)."""

    available: bool
    detail: str


class ReferenceKernel:
    """Plain PyTorch, on any device."""

    def forward(self, x, gates, lam, out, decay, scale, chunk, directions):
        names = [list(DIRECTIONS)[code] for code in directions]
        return torch.empty_like(x).copy_(propagate_reference(x, gates, lam, out, decay, scale, chunk or None, names))

    def backward(self, grad, *tensors_chunk_and_directions):
        # Inside a custom op autograd does not record, torch.func does.
        *tensors, chunk, directions = tensors_chunk_and_directions
        present = {i: tensor for i, tensor in enumerate(tensors) if tensor is not None}

        def forward(present):
            return self.forward(*(present.get(i) for i in range(len(tensors))), chunk, directions)

        (grads,) = torch.func.vjp(forward, present)[1](grad)
        # every gradient is laid out as its tensor is
        return tuple(
            torch.empty_like(tensor).copy_(grads[i]) if i in present else grad.new_empty(0)
            for i, tensor in enumerate(tensors)
        )


class CpuKernel:
    """C++ of csrc/, vectorised over channels; float16 goes through float32 copies."""

    def __init__(self, library: Path):
        if not hasattr(torch.ops.gspn_dit_cpu, "propagate"):  # building it has loaded it
            torch.ops.load_library(library)

    def forward(self, x, gates, lam, out, decay, scale, *options):
        if x.dtype == torch.float16:
            return self.forward(*_floats(x, gates, lam, out), decay, scale, *options).half()
        return torch.ops.gspn_dit_cpu.propagate(x, gates, lam, out, decay, scale, *options)

    def backward(self, grad, x, gates, lam, out, decay, scale, *options):
        if x.dtype == torch.float16:
            grads = self.backward(*_floats(grad, x, gates, lam, out), decay, scale, *options)
            likes = x, gates, lam, out, decay, scale
            return tuple(g.to((x if like is None else like).dtype) for g, like in zip(grads, likes, strict=True))
        return torch.ops.gspn_dit_cpu.propagate_backward(grad, x, gates, lam, out, decay, scale, *options)


def _floats(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]


class CudaKernel:
    """CUDA of csrc/, float32, bfloat16 and float16, on the current stream of the tensors' device.

    Lines of many thousand sites, which do not fit into shared memory, go to the reference, with one warning.
    """

    def __init__(self, library: Path):
        if not hasattr(torch.ops.gspn_dit_cuda, "propagate"):
            torch.ops.load_library(library)
        self.path = library

    @functools.cache  # noqa: B019 (there is one of them)
    def refusal(self, i: int) -> str:
        """Why it does not run on cuda:i, or nothing. Only a device that is used is asked: asking takes memory there."""
        reason = torch.ops.gspn_dit_cuda.unusable(torch.empty(0, device=f"cuda:{i}"))
        if not reason:
            return ""
        name, (major, minor) = torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)
        return (
            f"{self.path} does not run on cuda:{i} ({name}, compute capability {major}.{minor}): {reason}; leave "
            "TORCH_CUDA_ARCH_LIST unset or add this one to it, and build the kernel anew"
        )

    def forward(self, *arguments):
        return self._run("propagate", _reference.forward, *arguments)

    def backward(self, *arguments):
        return self._run("propagate_backward", _reference.backward, *arguments)

    def _run(self, name, reference, *arguments):
        try:
            return getattr(torch.ops.gspn_dit_cuda, name)(*arguments)
        except RuntimeError as error:
            if "a line is too long" not in str(error):
                raise
            _warn_once("gspn_dit runs on the reference operator, which is slow: " + str(error).splitlines()[0])
            return reference(*arguments)


BACKENDS = ("reference", "cpu", "cuda")


def status(name: str) -> Status:
    """Whether a backend runs here, `cuda` on the current device; the first call for a compiled one builds it."""
    if name == "reference":
        return Status(True, "plain PyTorch, any device")
    return _compiled(name, torch.cuda.current_device() if name == "cuda" and torch.cuda.is_available() else 0)[1]


def kernel(name: str, device: torch.device) -> Kernel:
    """The kernel of that name, or for "" the best for the device. Raises :class:`InputError` if it can't run there."""
    if name == "reference":
        return _reference
    if name and name != device.type:
        raise InputError(f"backend={name!r} with tensors on {device}: move them, or leave the backend out")
    if device.type in ("cpu", "cuda"):
        compiled, state = _compiled(device.type, device.index or 0)
        if compiled is not None:
            return compiled
        if name:
            raise InputError(f"backend={name!r} is not available: {state.detail}")
        cause = state.detail
    else:
        cause = f"there is no kernel for {device.type} tensors"
    _warn_once(f"gspn_dit runs on the reference operator, which is slow: {cause}")
    return _reference


_reference = ReferenceKernel()


_warn_once = functools.cache(warn)


def _compiled(name: str, index: int) -> tuple[Kernel | None, Status]:
    """The kernel of that name for a device of that index, and its status."""
    with _building:  # threads that come first together build once
        compiled, state = _load(name)
        if isinstance(compiled, CudaKernel) and (refusal := compiled.refusal(index)):
            return None, Status(False, refusal)
        return compiled, state


_building = threading.Lock()


@functools.cache
def _load(name: str) -> tuple[Kernel | None, Status]:
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
