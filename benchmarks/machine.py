"""The machine that figures belong to."""

from __future__ import annotations

import platform

import torch

from gspn_dit.precision import CPU_INFO, cpu_flags, native_bfloat16


def processor() -> str:
    """The CPU's name and, on x86-64, its widest instructions."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name, flags = next(names, platform.processor()), cpu_flags()
    if not flags or "sse2" not in flags:
        return name
    widest = next((words for flag, words in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "no AVX2")
    return f"{name} ({widest}, {'bf16' if native_bfloat16(torch.device('cpu'))[0] else 'no bf16'})"


def results_name(device: str) -> str:
    """What tells the results of this kind of machine apart in benchmarks/results."""
    return device if device == "cuda" or "avx512f" in (cpu_flags() or ()) else "cpu-avx2"


def machine(device: str = "cpu") -> str:
    """The GPU, or the CPU with its instructions and its threads, and the torch."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
