"""The CUDA kernels compiled for the CPU, every CUDA thread a fiber: their logic is tested without a GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gspn_dit.ops.build import CSRC, cuda_home, headers, recipe

EMULATION = Path(__file__).parent / "cuda_emulation"
SHARED_MEMORY = 227 * 1024  # of a Hopper block; less of it sends even small maps to the kernels for large ones


@functools.cache
def emulated_kernels():
    """torch.ops.gspn_dit_cuda, taking CPU tensors; compiled once for a state of the sources."""
    from torch.utils import cpp_extension

    sources, _, _ = recipe("cuda")
    flags = [
        "-O1",  # to compile for a faster run takes longer than the tests then save
        "-std=c++20",
        "-fPIC",
        "-shared",
        "-DGSPN_EMULATED_CUDA",
        "-fsanitize=alignment,bounds",
        "-fsanitize-undefined-trap-on-error",
    ]  # a misaligned vector would fail on a GPU too
    key = hashlib.sha256(f"{torch.__version__} {flags}".encode())
    for path in (*sources, *headers("cuda"), *sorted(EMULATION.glob("*"))):
        key.update(path.read_bytes())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    library = root / f"gspn_dit_emulated_cuda_{key.hexdigest()[:16]}.so"
    if not library.exists():
        root.mkdir(parents=True, exist_ok=True)
        half_built = library.with_suffix(f".{os.getpid()}")
        torch_lib = Path(torch.__file__).parent / "lib"
        subprocess.run(
            [
                os.environ.get("CXX", "c++"),
                *flags,
                f"-I{CSRC}",
                f"-I{EMULATION}",
                *(f"-I{folder}" for folder in cpp_extension.include_paths()),
                "-x",
                "c++",
                *map(str, sources),
                f"-L{torch_lib}",
                "-lc10",
                "-ltorch_cpu",
                "-ltorch",
                "-o",
                str(half_built),
            ],
            check=True,
        )
        half_built.replace(library)
    torch.ops.load_library(library)
    return torch.ops.gspn_dit_cuda


def built_driver(name: str, on_gpu: bool, folder: Path) -> ctypes.CDLL:
    """The library of tests/made/NAME.cu, which runs kernels by themselves: emulated, or on the GPU. Skips without."""
    library = folder / f"{name}.so"
    if on_gpu:
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        command = [cuda_home() / "bin" / "nvcc", "-arch=native", "-Xcompiler", "-fPIC", "-std=c++17"]
    else:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is None:
            pytest.skip("no C++ compiler")
        flags = "-std=c++20", "-fPIC", "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"
        command = [compiler, *flags, "-DGSPN_EMULATED_CUDA", f"-I{EMULATION}", "-x", "c++"]
    source = EMULATION.parent / f"{name}.cu"
    subprocess.run([*command, "-O1", "-shared", f"-I{CSRC}", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))
