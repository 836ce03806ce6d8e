"""Compiling the kernels of csrc/: just in time into torch's extension cache, or ahead of time into the package."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

# The C++ sources: inside an installed package, or beside it in a checkout.
PACKAGE = Path(__file__).parents[1]
CSRC = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"


def built(name: str) -> Path:
    """Path of the compiled kernel "cpu" or "cuda", built on first use and kept in torch's extension cache.

    The key holds what the result depends on (sources, torch, compilers, flags, machine), so machines may share a cache;
    a build happens in a folder of its own and is moved into place, so processes may race and a killed one leaves no
    lock. A kernel that was compiled into the package (see setup.py) comes first.

    Raises:
        RuntimeError: with the cause and the remedy.
    """
    if (ahead := ahead_of_time(name)).exists():
        return ahead
    sources, flags, cuda_flags = recipe(name)
    key = hashlib.sha256()
    for part in (_torch_key(), sys.platform, platform.machine(), _compiler(), *flags, *cuda_flags):
        key.update(part.encode())
    for source in (*sources, *headers(name)):
        key.update(source.read_bytes())
    key.update((_cpu_model() if name == "cpu" else ",".join(architectures())).encode())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    library = root / f"gspn_dit_{name}_{key.hexdigest()[:16]}.so"
    if not library.exists():
        build(name, library)
    return library


def ahead_of_time(name: str) -> Path:
    """Where a kernel that was compiled when the package was installed lies; the name tells the torch it is for."""
    return PACKAGE / f"_{name}_{_torch_key()}.so"


def recipe(name: str) -> tuple[list[Path], list[str], list[str]]:
    """Sources, C++ flags and nvcc flags of a kernel."""
    if name == "cpu":
        flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", *_native_flags()]
        if sys.platform == "linux":
            flags.append("-fopenmp")  # resolved by the OpenMP that torch has loaded, so that there is one thread pool
        return [CSRC / "cpu" / "propagate.cpp", CSRC / "cpu" / "binding.cpp"], flags, []
    cuda = [CSRC / "cuda" / file for file in ("propagate.cu", "tensor.cu", "binding.cpp")]
    return cuda, ["-O3"], ["-O3", "--threads", "0"]


def headers(name: str) -> list[Path]:
    """The headers that a kernel may include: the shared ones of csrc/ and those of its own folder."""
    return [*sorted(CSRC.glob("*.h")), *sorted((CSRC / name).rglob("*.h"))]


def build(name: str, library: Path) -> None:
    """Compiles a kernel to `library`, in a temporary folder beside it."""
    if shutil.which(_compiler()) is None:
        raise RuntimeError(
            f"no C++ compiler: {_compiler()!r} is not on PATH; install g++ (or set CXX) to build the {name} kernel"
        )
    if name == "cuda":
        check_toolkit()
        if not architectures():
            raise RuntimeError(
                "no CUDA device of compute capability 8.0 or newer is here: set TORCH_CUDA_ARCH_LIST (say '9.0') to "
                "build the cuda kernel for another machine"
            )
    print(f"gspn_dit: building the {name} kernel, once (about half a minute) ...", file=sys.stderr, flush=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    sources, flags, cuda_flags = recipe(name)
    with (
        tempfile.TemporaryDirectory(dir=library.parent, prefix=f"gspn_dit_{name}_build_") as folder,
        _environment(name),
    ):
        from torch.utils import cpp_extension  # slow to import, so only where there is something to build

        try:
            cpp_extension.load(
                f"gspn_dit_{name}",
                [str(source) for source in sources],
                extra_cflags=flags,
                extra_cuda_cflags=cuda_flags,
                extra_include_paths=[str(CSRC)],
                build_directory=folder,
                with_cuda=name == "cuda",
                is_python_module=False,
                is_standalone=False,
            )
        except Exception as error:
            lines = str(error).splitlines()  # the first is torch's own
            causes = [line for line in lines[1:] if re.search(r"error\s*:|fatal", line)] or lines
            compiler = "nvcc" if name == "cuda" else _compiler()
            raise RuntimeError(f"the {name} kernel did not compile with {compiler}: {causes[0]}") from error
        os.replace(Path(folder) / f"gspn_dit_{name}.so", library)


def check_toolkit() -> None:
    """Raises RuntimeError, naming both versions and the remedy, where nvcc is missing or is not torch's CUDA."""
    wanted = torch.version.cuda
    if wanted is None:
        raise RuntimeError("this torch is built without CUDA: install a CUDA build of torch to run the cuda kernel")
    home = cuda_home()
    nvcc = home / "bin" / "nvcc" if home else None
    if nvcc is None or not nvcc.exists():
        raise RuntimeError(
            f"torch is built for CUDA {wanted}, and there is no nvcc: install the CUDA {wanted} toolkit, or set "
            "CUDA_HOME to where it is"
        )
    reply = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", reply)
    if found is None or found[1].split(".")[0] != wanted.split(".")[0]:
        raise RuntimeError(
            f"torch is built for CUDA {wanted}, and {nvcc} is of CUDA {found[1] if found else 'unknown'}: install a "
            f"CUDA {wanted.split('.')[0]} toolkit, or set CUDA_HOME to where it is"
        )


def cuda_home() -> Path | None:
    """The toolkit's folder: CUDA_HOME, else where the nvcc on PATH really lies, else /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    if (nvcc := shutil.which("nvcc")) is not None:
        # nvcc may be a link or a script that starts the real one: it knows where its toolkit is
        reply = subprocess.run(
            [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        if found := re.search(r"^#\$ TOP=(.*)$", reply.stderr, re.MULTILINE):
            return Path(found[1]).resolve()
    return Path("/usr/local/cuda") if Path("/usr/local/cuda/bin/nvcc").exists() else None


def architectures() -> list[str]:
    """What the CUDA kernel is compiled for: TORCH_CUDA_ARCH_LIST, else the devices of this machine.

    The kernel needs compute capability 8.0 (Ampere): what lies below is left out of the list.
    """
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    chosen = [arch for arch in chosen if arch and arch != "native" and not _is_below_8(arch)]
    if chosen:
        return chosen
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(capabilities) if major >= 8]


def _is_below_8(arch: str) -> bool:
    number = re.match(r"(\d+)\.\d", arch)
    old = ("kepler", "maxwell", "pascal", "volta", "turing")
    return int(number[1]) < 8 if number else arch.lower().startswith(old)


@contextlib.contextmanager
def _environment(name: str) -> Iterator[None]:
    """The ninja of this environment on PATH, also when it is used without being activated; for CUDA its toolkit."""
    changes = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    if name == "cuda":
        changes |= {"CUDA_HOME": str(cuda_home()), "TORCH_CUDA_ARCH_LIST": ";".join(architectures())}
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        if name == "cuda":
            from torch.utils import cpp_extension

            cpp_extension.CUDA_HOME = changes["CUDA_HOME"]  # it was looked up when the module was imported
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _torch_key() -> str:
    """What a compiled kernel's calls into torch depend on."""
    return re.sub(r"\W", "_", f"{torch.__version__}_{torch.version.cuda or 'cpu'}")


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
