"""The backends of `propagate` by name, and which of them runs a call."""

from __future__ import annotations

import functools

import torch

from gspn_dit.errors import InputError, warn
from gspn_dit.ops.backend import Backend, Call
from gspn_dit.ops.cpu import NativeCpu
from gspn_dit.ops.cuda import NativeCuda
from gspn_dit.ops.reference import Reference

_REFERENCE = Reference()
_REGISTERED: dict[str, Backend] = {}
_SUCCESSORS = {"cpu": "native-cpu", "cuda": "native-cuda"}  # what backends were called when devices named them


def register(backend: Backend) -> None:
    """Let `propagate` use a backend. Raises ValueError if its name is taken."""
    if backend.name in _REGISTERED:
        raise ValueError(f"there is a backend named {backend.name!r}: unregister it first, or choose another name")
    _REGISTERED[backend.name] = backend
    _compiled_for.cache_clear()


def unregister(name: str) -> None:
    """Forget a backend. Raises ValueError for the reference, which runs what no other backend can."""
    if find(name, "name") is _REFERENCE:
        raise ValueError("the reference stays: it runs what no other backend can")
    del _REGISTERED[name]
    _compiled_for.cache_clear()


def backends() -> list[Backend]:
    """All backends, in the order in which they were registered."""
    return list(_REGISTERED.values())


def find(name: str, argument: str = "backend") -> Backend:
    """The backend of that name. Raises :class:`InputError`, naming the argument, if there is none."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in _SUCCESSORS:
        raise InputError(f"this backend is now named {_SUCCESSORS[name]!r}", argument=argument, value=name)
    raise InputError(argument=argument, value=name, wanted=f"one of {tuple(_REGISTERED)}")


def choose(call: Call, name: str = "", backward: bool = False) -> Backend:
    """The backend that runs the forward or the backward pass of a call.

    That is the one of the name, or for "" the first by priority that can.

    If only the reference can, one warning says why.

    Raises:
        InputError: the backend of that name cannot run the call, and why.
    """
    if name:
        return _named(name, call, backward)
    device, reasons = call.x.device, []
    for backend in _compiled_for(device.type):
        available, detail = backend.status(device)
        reason = backend.supports(call, backward) if available else detail
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    cause = "; ".join(reasons) or f"there is no kernel for {device.type} tensors"
    _warn_once(f"gspn_dit runs on the reference operator, which is slow: {cause}")
    return _REFERENCE


def require_kernels(device: torch.device) -> None:
    """Raise :class:`InputError`, with the causes, where every call on the device would run on the reference."""
    states = {backend.name: backend.status(device) for backend in _compiled_for(device.type)}
    if not any(state.available for state in states.values()):
        causes = "; ".join(f"{name}: {state.detail}" for name, state in states.items())
        raise InputError(f"no kernel runs on {device}: {causes or 'there is none for such devices'}")


def _named(name: str, call: Call, backward: bool) -> Backend:
    backend, device = find(name), call.x.device
    if backend.device_types is not None and device.type not in backend.device_types:
        raise InputError(
            f"the tensors are on {device}", argument="backend", value=name, remedy="move them, or leave the backend out"
        )
    available, detail = backend.status(device)
    if not available:
        raise InputError(f"not available here: {detail}", argument="backend", value=name)
    if (reason := backend.supports(call, backward)) is not None:
        raise InputError(
            f"cannot run this call: {reason}",
            argument="backend",
            value=name,
            remedy="leave the backend out, or change the call",
        )
    return backend


@functools.cache
def _compiled_for(device_type: str) -> tuple[Backend, ...]:
    """The backends that come before the reference for tensors on a device, by priority."""
    suited = [b for b in backends() if b.device_types is None or device_type in b.device_types]
    return tuple(sorted((b for b in suited if b is not _REFERENCE), key=lambda b: -b.priority))


_warn_once = functools.cache(warn)

for _backend in (_REFERENCE, NativeCpu(), NativeCuda()):
    register(_backend)
