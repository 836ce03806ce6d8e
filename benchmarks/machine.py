"""The machine that figures belong to."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine() -> str:
    """The CPU, its threads and the torch."""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
