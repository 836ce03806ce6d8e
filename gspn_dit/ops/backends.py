"""The kernels behind `propagate`: which there are, whether they run here or why not, and how they are built."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gspn_dit.errors import InputError
from gspn_dit.ops.reference import DIRECTIONS, propagate_reference

# The C++ sources: inside an installed package, or beside it in a checkout.
PACKAGE = Path(__file__).parents[1]
CSRC = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"


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
        return propagate_reference(x, gates, lam, out, chunk or None, names).contiguous()

    def backward(self, grad, x, gates, lam, out, chunk, directions):
        # Inside a custom op autograd does not record, torch.func does.
        inputs = (x, gates, lam) if out is None else (x, gates, lam, out)
        grads = torch.func.vjp(
            lambda x, gates, lam, out=None: self.forward(x, gates, lam, out, chunk, directions), *inputs
        )[1](grad)
        grad_x, *rest = grads if out is not None else (*grads, x.new_empty(0))
        # the layouts that the operator promises: x's contiguous, each gate's as the gate's own
        return grad_x.contiguous(), *(
            torch.empty_like(like).copy_(g) if like is not None else g
            for like, g in zip((gates, lam, out), rest, strict=True)
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


BACKENDS = ("reference", "cpu")


def status(name: str) -> Status:
    """Whether a backend runs here; the first call for a compiled one builds it."""
    if name == "reference":
        return Status(True, "plain PyTorch, any device")
    return _cpu()[1]


def kernel(name: str, device: torch.device) -> Kernel:
    """The kernel of that name, or for "" the best for the device. Raises :class:`InputError` if it can't run there."""
    if name == "reference":
        return _reference
    if name == "cpu" and device.type != "cpu":
        raise InputError(f"backend='cpu' with tensors on {device}: move them to the CPU, or leave the backend out")
    if device.type == "cpu":
        compiled, state = _cpu()
        if compiled is not None:
            return compiled
        if name == "cpu":
            raise InputError(f"backend='cpu' is not available: {state.detail}")
    _warn_reference(device.type)
    return _reference


_reference = ReferenceKernel()


@functools.cache
def _warn_reference(device_type: str) -> None:
    cause = _cpu()[1].detail if device_type == "cpu" else f"there is no kernel for {device_type} tensors"
    warnings.warn(f"gspn_dit runs on the reference operator, which is slow: {cause}", stacklevel=2)


@functools.cache
def _cpu() -> tuple[CpuKernel | None, Status]:
    try:
        library = build_cpu()
        return CpuKernel(library), Status(True, f"C++, {torch.get_num_threads()} threads, {library}")
    except Exception as error:  # whatever goes wrong in a build, the reference still works
        return None, Status(False, str(error))


def build_cpu() -> Path:
    """Path of the compiled CPU kernel, built on first use and kept in torch's extension cache.

    The key holds what the result depends on (sources, torch, compiler, flags, CPU), so machines may share a cache; a
    build happens in a folder of its own and is moved into place, so processes may race and a killed one leaves no lock.
    Raises RuntimeError with the cause and the remedy.
    """
    compiler = os.environ.get("CXX", "c++")
    sources = [*sorted(CSRC.glob("*cpu*")), CSRC / "propagate.h"]
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", *_native_flags()]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # resolved by the OpenMP that torch has loaded, so that there is one thread pool
    key = hashlib.sha256()
    for part in (torch.__version__, sys.platform, _cpu_model(), compiler, *flags, *(s.read_text() for s in sources)):
        key.update(part.encode())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    library = root / f"gspn_dit_cpu_{key.hexdigest()[:16]}.so"
    if not library.exists():
        _compile([source for source in sources if source.suffix == ".cpp"], flags, library)
    return library


def _compile(sources: list[Path], flags: list[str], library: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"no C++ compiler: {compiler!r} is not on PATH; install g++ (or set CXX) to build the CPU kernel"
        )
    print("gspn_dit: building the CPU kernel, once (about half a minute) ...", file=sys.stderr, flush=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="gspn_dit_cpu_build_") as folder, _ninja_on_path():
        from torch.utils import cpp_extension  # slow to import, so only where there is something to build

        try:
            cpp_extension.load(
                "gspn_dit_cpu",
                [str(source) for source in sources],
                extra_cflags=flags,
                build_directory=folder,
                is_python_module=False,
                is_standalone=False,
            )
        except Exception as error:
            causes = [line for line in str(error).splitlines() if "error:" in line] or [str(error)]
            raise RuntimeError(f"the CPU kernel did not compile with {compiler}: {causes[0]}") from error
        os.replace(Path(folder) / "gspn_dit_cpu.so", library)


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """The ninja of this environment, also when it is used without being activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _native_flags() -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    return ["-march=native", *(["-mprefer-vector-width=512"] if "avx512f" in _cpu_model() else [])]


@functools.cache
def _cpu_model() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
