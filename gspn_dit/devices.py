"""Where tensors live, and which processes share the work."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from gspn_dit.errors import InputError

if TYPE_CHECKING:
    from accelerate import PartialState

_LONGEST_WAIT = timedelta(days=1)  # of a process that has done its share for the slowest one


def choose_device(name: str = "auto") -> torch.device:
    """The device called so, or for `auto` the accelerator if there is one. Raises :class:`InputError`."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device={name!r}: {reason}; give `auto`, `cpu` or a device that is there") from error


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has in all: a CUDA GPU its own, any other the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def join_processes(device: str = "auto") -> tuple[PartialState, torch.device]:
    """The processes that `accelerate launch` started, this one among them, and the device of this one.

    A process that nothing launched is alone, on the device called so.

    Raises :class:`InputError` for a device that is not there, or one device for several processes.
    """
    from accelerate import PartialState  # a pipeline needs a device, and none of accelerate
    from accelerate.utils import parse_flag_from_env

    forced = device == "auto" and parse_flag_from_env("ACCELERATE_USE_CPU")  # accelerate launch --cpu
    chosen = choose_device("cpu" if forced else device)
    if "LOCAL_RANK" not in os.environ:
        return PartialState(), chosen
    if device not in ("auto", chosen.type):
        raise InputError(f"device={device!r}: under accelerate launch each process has its own; leave it out")
    processes = PartialState(cpu=chosen.type == "cpu", timeout=_LONGEST_WAIT)
    return processes, processes.device
