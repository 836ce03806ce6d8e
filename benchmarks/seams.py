"""Seams: whether images show where the scans of the network that drew them start anew."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor


def seam_excess(images: Tensor, token: int, borders: Collection[int]) -> tuple[float, float]:
    """By how much the steps at some borders of tokens are larger than those at all others.

    A step is the mean absolute difference of the two pixels on either side of a border, over images, colours and the
    border's length.

    Args:
        images: (B, 3, H, W), H and W divisible by `token`.
        token: Side of a token in pixels.
        borders: How many tokens lie before each of the borders, both among rows and among columns.

    Returns:
        The mean of their steps over the mean of the others, less 1; and its distance from the mean of the others in
        standard deviations of these. Both are means of what is found along rows and along columns.
    """
    found = []
    for axis in (-2, -1):
        steps = images.float().diff(dim=axis).abs().movedim(axis, -1).flatten(0, -2).mean(0)[token - 1 :: token]
        at_borders = steps[[border - 1 for border in borders]].mean()
        others = steps[[i for i in range(len(steps)) if i + 1 not in borders]]
        excess = at_borders - others.mean()
        found.append((excess / others.mean(), excess / others.std()))
    ratios, deviations = zip(*found, strict=True)
    return sum(ratios).item() / 2, sum(deviations).item() / 2
