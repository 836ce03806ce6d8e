"""The protocol of a kind of condition."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

Condition = dict[str, Tensor]
"""Tensors by the names of the model's arguments, `model(latents, timesteps, **condition)`; row b is of image b."""


class Conditioning(Protocol):
    """A kind of condition.

    Attributes:
        names: The tensors of its conditions. A model takes them as arguments of these names, and a source of training
            data gives them by these names.
    """

    names: tuple[str, ...]

    def read(self, given: Any) -> Condition:
        """The condition of what a person gives, on the CPU, one row per image.

        Raises :class:`~gspn_dit.errors.InputError` for what it cannot read.
        """
        ...

    def null(self, count: int) -> Condition:
        """The condition of `count` images that says nothing of them, on the CPU: what guidance leads away from."""
        ...

    def drop(self, condition: Condition, mask: Tensor) -> Condition:
        """The condition with :meth:`null`'s rows where `mask` (B,) bool is true; the condition given stays as it is."""
        ...
