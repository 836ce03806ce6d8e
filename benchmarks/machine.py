"""The machine that figures belong to."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def cpu_flags() -> set[str]:
    """What the CPU can do, by Linux's names on x86-64; empty elsewhere."""
    return set(_of_cpuinfo("flags").split())


def has_bf16() -> bool:
    """Whether the CPU multiplies in bfloat16: where it does not, torch takes many times as long as in float32."""
    return not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})


def processor() -> str:
    """The CPU's name and, on x86-64, its widest instructions."""
    name, flags = _of_cpuinfo("model name") or platform.processor(), cpu_flags()
    if not flags:
        return name
    widest = next((words for flag, words in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "no AVX2")
    return f"{name} ({widest}, {'bf16' if has_bf16() else 'no bf16'})"


def results_name(device: str) -> str:
    """What tells the results of this kind of machine apart in benchmarks/results."""
    return device if device == "cuda" or "avx512f" in cpu_flags() else "cpu-avx2"


def _of_cpuinfo(line: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((text.split(":")[1].strip() for text in lines if text.startswith(line)), "")


def machine(device: str = "cpu") -> str:
    """The GPU, or the CPU with its instructions and its threads, and the torch."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
