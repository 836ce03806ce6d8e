"""What an objective is: it turns a model and a batch into losses."""

from __future__ import annotations

from typing import NotRequired, Protocol, TypedDict

from torch import Tensor, nn


class Batch(TypedDict):
    """What an objective may need of a batch of B images.

    Args:
        latents: (B, C, h, w), normalised, without noise.
        noise: (B, C, h, w), standard normal, in the latents' type or float32.
        u: (B,) float32, uniform in [0, 1): what a time is made from.
        condition: What the model is told of each image, by the names of its arguments, (B, …); null
            where it is dropped.
        known: The same with nothing dropped, for an objective that compares the model's answer with it.
    """

    latents: Tensor
    noise: Tensor
    u: Tensor
    condition: dict[str, Tensor]
    known: NotRequired[dict[str, Tensor]]


class Objective(Protocol):
    """What is learned. It draws nothing itself: all that is random comes with the batch, so that a run can resume."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each sample, (B,) float32."""
        ...
