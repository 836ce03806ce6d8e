"""Stochastic depth (arXiv 1603.09382): training leaves a block's branch out for some samples."""

from __future__ import annotations

from torch import Tensor


def drop_path(branch: Tensor, chance: float, training: bool) -> Tensor:
    """A branch (B, H, W, C) without some samples, and with the others scaled up so that the mean stays.

    Args:
        branch: What a block adds to its input.
        chance: For each sample, that its branch is left out.
        training: Whether any is.
    """
    if not training or chance == 0:
        return branch
    keep = 1 - chance
    return branch * branch.new_empty(len(branch), 1, 1, 1).bernoulli_(keep).div_(keep)
