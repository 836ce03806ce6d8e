"""Devices: the one that a name stands for, and how much memory it has."""

from __future__ import annotations

import os

import torch

from gspn_dit.errors import InputError


def choose_device(name: str = "auto") -> torch.device:
    """The device called so, or for `auto` the accelerator if there is one. Raises :class:`InputError`."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            reason, argument="device", value=name, remedy="give `auto`, `cpu` or a device that is there"
        ) from error


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has in all: a CUDA GPU its own, any other the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
