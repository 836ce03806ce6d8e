"""The average of the weights that sampling uses."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """Exponential moving average of a model's weights, kept as a model of its own, in float32 and eval mode.

    The decay at step n is min(decay, (1 + n) / (10 + n)), so that a short run does not remember its first weights; at
    0.9999 the two meet at step 90,000.

    Args:
        model: The model to follow; it is copied.
        decay: The average's memory is about 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step `step` (1, 2, …)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = list(self.model.parameters()), [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
