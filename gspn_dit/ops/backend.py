"""What a backend of `propagate` is: the call that it is given, and what it offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Call(NamedTuple):
    """The scans of one call of the operator: their operands, then their options.

    :func:`gspn_dit.ops.propagate` says what they are and has checked them. Here `chunk` 0 is the whole map, `window` 0
    is none (one of both is 0), and `directions` are indices into :data:`gspn_dit.ops.reference.DIRECTIONS`. The
    operator's schema is read from these annotations.
    """

    x: Tensor
    gates: Tensor
    input_gate: Tensor
    output_gate: Tensor | None = None
    decay: Tensor | None = None
    scale: Tensor | None = None
    chunk: int = 0
    window: int = 0
    shift: int = 0
    directions: Sequence[int] = (0, 1, 2, 3)

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """What of it has gradients, in the order of :data:`OPERANDS`."""
        return self[:-4]  # all but OPTIONS

    @property
    def options(self) -> tuple[int | Sequence[int], ...]:
        """The rest, in the order of :data:`OPTIONS`."""
        return self[-4:]


OPTIONS = ("chunk", "window", "shift", "directions")
OPERANDS = Call._fields[: -len(OPTIONS)]  # these have gradients


class Status(NamedTuple):
    """Whether a backend runs on a machine, and details: if it does not, why and the remedy."""

    available: bool
    detail: str


class Backend(Protocol):
    """One implementation of the operator, found by its name in :mod:`gspn_dit.ops.registry`."""

    @property
    def name(self) -> str:
        """What `backend=` and `gspn-dit ops --require` call it. Not a device's name: a device may have several."""
        ...

    @property
    def device_types(self) -> Sequence[str] | None:
        """Types of the devices whose tensors it takes ("cpu", "cuda", ...); None is any."""
        ...

    @property
    def priority(self) -> int:
        """Of the backends that can run a call, the one of the highest priority does.

        The reference has 0, the kernels of csrc/ have 100.
        """
        ...

    def status(self, device: torch.device | None = None) -> Status:
        """Whether it runs on this machine, on that device (None: the current one).

        Asked at every call, so it must be quick after the first time, which may build what has to be built. It raises
        nothing.
        """
        ...

    def supports(self, call: Call, backward: bool = False) -> str | None:
        """Why it cannot run the forward pass of this call, or its backward pass, in words; None if it can.

        Asked before each pass, where the status is available. None promises that every field of the call is heeded:
        what has no windows says so where `call.window` is not 0. The answer depends on these arguments alone. Another
        backend may run the other pass: the gradients are computed from the operands.
        """
        ...

    def forward(self, call: Call) -> Tensor:
        """y, (B, H, W, C), with the dtype and strides of `torch.empty_like(call.x)`."""
        ...

    def backward(self, grad: Tensor, call: Call) -> tuple[Tensor, ...]:
        """Gradients of the operands in their order, for the gradient of y.

        Each has the dtype and strides of `torch.empty_like(operand)`; of an operand that is None, it is an empty tensor
        of x's dtype.
        """
        ...


@runtime_checkable
class FusesTail(Protocol):
    """What a :class:`Backend` may offer besides: the scans together with the tail, as :mod:`gspn_dit.ops.tail` has it.

    Where a backend lacks these methods, or says no, the plain tail runs before or after its scans.
    """

    def supports_tail(self, call: Call, backward: bool = False) -> bool:
        """Whether it runs the forward pass, or the backward pass, of a call that it supports with a tail.

        As for `supports`, the answer depends on these arguments alone, and another backend may run the other pass.
        """
        ...

    def forward_with_tail(self, call: Call, direct: Tensor) -> tuple[Tensor, Tensor]:
        """y, as `forward` has it, and 1 / rms of each token and group, (B, H, W, G), contiguous, in direct's dtype."""
        ...

    def backward_with_tail(
        self, grad: Tensor, y: Tensor, inverse_rms: Tensor, call: Call, direct: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of the operands, as `backward` has them, and then of direct, for the gradient of y.

        y and inverse_rms are what the forward pass returned.
        """
        ...
