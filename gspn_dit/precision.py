"""What networks compute in: bfloat16 where the device has instructions for it, float32 elsewhere."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gspn_dit.arguments import MixedPrecision
from gspn_dit.errors import warn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # what /proc/cpuinfo calls x86's instructions, and ARM's
CPU_INFO = Path("/proc/cpuinfo")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """What a network computes in, and why.

    Args:
        asked: What was asked for.
        name: What that is here: `no` (float32), `bf16` or `fp16`, as accelerate calls them.
        native: Whether the device has instructions for bfloat16.
        reason: How that is known, in words.
    """

    asked: MixedPrecision
    name: Literal["no", "bf16", "fp16"]
    native: bool
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products and convolutions."""
        return DTYPES.get(self.name, torch.float32)

    def say(self) -> None:
        """Say it as one line, a warning for bf16 on a device that lacks it."""
        if self.name == "bf16" and not self.native:
            warn(f"mixed_precision=bf16: {self.reason}; `auto` computes in float32, many times as fast here")
            return
        why = f"auto: {self.reason}" if self.asked == "auto" else self.asked
        logger.info(f"computing in {str(self.dtype).removeprefix('torch.')} (mixed_precision {why})")


def choose_precision(asked: MixedPrecision, device: torch.device) -> Precision:
    """What `asked` is on a device: `auto` is bf16 where it is native and float32 elsewhere; never fp16.

    A function of the device's kind alone, not of a timing: two starts on one machine agree.
    """
    native, reason = native_bfloat16(device)
    auto: Literal["no", "bf16"] = "bf16" if native else "no"
    return Precision(asked, auto if asked == "auto" else asked, native, reason)


def native_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Whether a device has instructions for bfloat16, and how that is known."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"compute capability {major}.{minor}"
    if device.type != "cpu":
        return False, f"not known of {device.type}"
    if (flags := cpu_flags()) is None:
        return False, "the CPU's instructions are not known"
    found = sorted(BFLOAT16_FLAGS & flags)
    return bool(found), f"this CPU has {found[0]}" if found else "this CPU has no bfloat16 instructions"


def cpu_flags() -> set[str] | None:
    """The instruction sets that Linux names of this CPU; None where it does not."""
    try:
        with CPU_INFO.open() as lines:
            return next(set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return None


def autocast(device: torch.device, name: str) -> AbstractContextManager[object]:
    """In the block, what can be is computed in `bf16` or `fp16`; `no` leaves everything as it is."""
    return torch.autocast(device.type, DTYPES[name]) if name in DTYPES else nullcontext()
