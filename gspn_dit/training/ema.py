"""Running averages of the weights: the one that sampling uses, and those that any other is made from afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gspn_dit.training.sharding import local_tensor


class EMA:
    """A running average of a model's weights: in their own type, and sharded where they are.

    Args:
        model: The model to follow, as it is trained.
        decay: The decay β of the update at step 1, 2, …: average ← β·average + (1 - β)·weights.

    Attributes:
        tensors: The average by parameter name.
    """

    def __init__(self, model: nn.Module, decay: Callable[[int], float]) -> None:
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step `step` (1, 2, …)."""
        averages = [local_tensor(tensor) for tensor in self.tensors.values()]
        torch._foreach_lerp_(averages, [local_tensor(p) for p in model.parameters()], 1 - self.decay(step))


def exponential(decay: float) -> Callable[[int], float]:
    """min(decay, (1 + n) / (10 + n)) at step n, so that a short run does not remember its first weights.

    Its memory is about 1 / (1 - decay) steps; at 0.9999 the two meet at step 90,000.
    """
    return lambda step: min(decay, (1 + step) / (10 + step))


def power_function(gamma: float) -> Callable[[int], float]:
    """(1 - 1/n)^(γ+1) at step n: weights at step τ count as τ^γ (EDM2, arXiv 2312.02696, equations 1 and 2)."""
    return lambda step: (1 - 1 / step) ** (gamma + 1)
