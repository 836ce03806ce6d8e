"""Where tensors live."""

from __future__ import annotations

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
        raise InputError(f"device={name!r}: {reason}; give `auto`, `cpu` or a device that is there") from error
