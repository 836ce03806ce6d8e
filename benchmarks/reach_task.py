"""A made task that needs reach: images whose far ends must agree, with nothing between them.

An image is grey but for its first and its last column, each of which is four bands of pixels. A band of the first is
black or white by the toss of a coin; its partner, the band of the last column in the same rows, has the same colour.
Nothing else tells the colour: not the class, not the middle, not another band. So a network that carries nothing across
the map can do no better than judge each end by its own noisy pixels, and paints ends that agree half of the time; one
that does can judge by both.

What it asks of a mixer, all alike: to find the same rows at the other edge, side - 1 sites away. A scan along rows goes
there if its gates have learned to keep to the row, however far. Softmax attention has to know rows from each other, by
positions or by what the padding tells. Linear attention has as many channels as it has to hold bands in. Convolutions,
and scans in chunks alone, do not get there at all. (A first version had a colour of its own in every row, and no model
learned to use the far end in the few hundred steps that a CPU has for it.)

Both best guesses are known in closed form, so that what a network carries is a number: :func:`reach_gained`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gspn_dit.data.images import SPLITS

CONTRAST = 2.0  # ends are -2 and 2, so that the whole image has about half of unit scale
BANDS = 4
TIMES = (0.7, 0.8, 0.85, 0.9)  # where the far end is worth most: nearer to 0 an end is plain, nearer to 1 both are lost


class FarEnds(Dataset):
    """Images float32 (1, side, side) of -2, 0 and 2, and the one label 0; `dataset[i]` depends on split and i alone.

    Args:
        side: Pixels, a multiple of 4.
        split: `train` or `test`.
        count: How many there are.
    """

    def __init__(self, side: int, split: str, count: int) -> None:
        self.side, self.split, self.count = side, split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        draw = np.random.Generator(np.random.PCG64([SPLITS.index(self.split), index]))
        colours = torch.from_numpy(draw.choice(np.array([-CONTRAST, CONTRAST], dtype=np.float32), BANDS))
        image = torch.zeros(1, self.side, self.side)
        image[..., 0] = image[..., -1] = colours.repeat_interleave(self.side // BANDS)
        return image, 0


def ends(images: Tensor) -> Tensor:
    """The first and the last column of images (..., 1, side, side), (..., side, 2)."""
    return images[..., 0, :, [0, -1]]


def bands(columns: Tensor) -> Tensor:
    """Columns (..., side, 2) cut into their bands, (..., 4, side / 4, 2)."""
    return columns.unflatten(-2, (BANDS, -1))


def agreement(images: Tensor) -> float:
    """The share of bands of images (B, 1, side, side) whose two ends have one sign; 0.5 is chance."""
    left, right = (bands(ends(images)).mean(-2) > 0).unbind(-1)
    return (left == right).float().mean().item()


def best_guess(noisy_ends: Tensor, t: float, reach: bool) -> Tensor:
    """The mean of the clean ends given the noisy ones, (..., side, 2): what the least squared error takes.

    With n pixels of x = ±c and x_t = (1-t)·x + t·ε it is c·tanh(c·(1-t)/t² · Σ x_t), over the pixels of one band, or
    of two of one colour.

    Args:
        noisy_ends: x_t at the ends, (..., side, 2).
        t: Time in (0, 1).
        reach: Whether a guess may look at the other end.
    """
    seen = bands(noisy_ends).sum((-2, -1) if reach else -2, keepdim=True)
    seen = seen.expand_as(bands(noisy_ends)).flatten(-3, -2)
    return CONTRAST * torch.tanh(CONTRAST * (1 - t) / t**2 * seen)


def reach_gained(velocity: Callable[[Tensor, float], Tensor], images: Tensor, noise: Tensor) -> float:
    """How much of what the far end is worth a network makes use of: 0 for none of it, 1 for all.

    (L₁ - L) / (L₁ - L₂), where L is the squared error of the network's velocity at the ends, and L₁ and L₂ are those
    of the best guesses from one end and from both, on the same noisy images, summed over :data:`TIMES`. Below 0 it
    does worse than a perfect guess from one end.

    Args:
        velocity: Called with noisy images (B, 1, side, side) and a time; their velocity ε - x, of that shape.
        images: Clean images (B, 1, side, side).
        noise: ε, of that shape.
    """
    worth = gained = 0.0
    for t in TIMES:
        noisy = (1 - t) * images + t * noise
        target = ends(noise - images)
        network = (ends(velocity(noisy, t)) - target).square().mean().item()
        one, both = (
            ((ends(noisy) - best_guess(ends(noisy), t, reach)) / t - target).square().mean().item()
            for reach in (False, True)
        )
        worth += one - both
        gained += one - network
    return gained / worth
