"""Triton kernels of `gspn_dit.ops.passes` as machine code, compiled where no GPU is."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {"bf16": "*bf16", "f32": "*fp32"}
NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@dataclass
class Compiled:
    """What a kernel became: registers a thread, bytes that spill, and its global accesses by their width in bits."""

    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: int


def compiled(kernel: Any, arguments: dict[str, Any], capability: int, warps: int) -> Compiled:
    """A kernel for arguments that are a type ("*bf16", "i32") each, or a constant; None is a pointer that is absent.

    Pointers, and numbers of type "i32", are multiples of 16, as in the named sizes.
    """
    names = kernel.arg_names
    signature = {name: value if isinstance(value, str) else "constexpr" for name, value in arguments.items()}
    assert set(signature) == set(names), set(signature) ^ set(names)
    signature = {name: signature[name] for name in names}
    constants = {(names.index(name),): value for name, value in arguments.items() if not isinstance(value, str)}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if isinstance(arguments[name], str) and arguments[name] != "i32 odd"
    }
    signature = {name: kind.removesuffix(" odd") for name, kind in signature.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    ptx = result.asm["ptx"]
    return Compiled(
        *resources(result.asm["cubin"]),
        result.metadata.shared,
        accesses(ptx, "ld"),
        accesses(ptx, "st"),
        len(re.findall(r"^\t[^.]", ptx, re.M)),
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory, from `cuobjdump --dump-resource-usage`."""
    tool = NVDISASM.with_name("cuobjdump")
    path = Path("/tmp") / f"pass-{id(cubin)}.cubin"
    path.write_bytes(cubin)
    try:
        report = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    finally:
        path.unlink()
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", report.stdout).group(1)) for key in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def accesses(ptx: str, kind: str) -> dict[int, int]:
    """Global loads ("ld") or stores ("st") by their width in bits."""
    widths: dict[int, int] = {}
    for vector, bits in re.findall(rf"\b{kind}\.global(?:\.[a-z0-9_:]+)*?(?:\.v([24]))?\.[bfu](\d+)", ptx):
        width = int(vector or 1) * int(bits)
        widths[width] = widths.get(width, 0) + 1
    return widths
