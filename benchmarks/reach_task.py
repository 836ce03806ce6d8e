"""A made task that needs reach: images whose far ends must agree, with nothing between them.

An image is grey but for its first and its last four columns. There every row has a colour of its own, three numbers
from a normal distribution, the same at both ends. Nothing else tells the colour: not the class, not the middle, not
another row. So a network that carries nothing across the map can do no better than judge each end by its own noisy
pixels, and paints ends that have nothing to do with each other; one that does can judge by twice as many.

What it asks of a mixer, all alike: to find the same row at the other edge, side - 7 tokens away or more. A scan along
rows goes there if its gates keep to the row. Softmax attention has to know rows from each other, by positions or by
what the padding tells. Linear attention has as many channels as it has to hold the rows in. Convolutions, and scans in
chunks alone, do not get there at all. (Earlier versions had one column at each end, of a colour a row or of four bands:
too small a part of the image for any model to see to it in the few hundred steps a CPU has.)

Both best guesses are known in closed form, so that what a network carries is a number: :func:`reach_gained`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gspn_dit.data.images import SPLITS

COLOUR = 1.5  # standard deviation of a row's three numbers
END = 4  # columns of an end
TIMES = (0.5, 0.6, 0.7, 0.8, 0.9)  # where the far end is worth most: before, an end is plain; after, both are lost


class FarEnds(Dataset):
    """Images float32 (3, side, side) and the one label 0; `dataset[i]` depends on split and i alone.

    Args:
        side: Pixels, 12 or more.
        split: `train` or `test`.
        count: How many there are.
    """

    def __init__(self, side: int, split: str, count: int) -> None:
        self.side, self.split, self.count = side, split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        draw = np.random.Generator(np.random.PCG64([SPLITS.index(self.split), index]))
        colours = torch.from_numpy(COLOUR * draw.standard_normal((3, self.side, 1), dtype=np.float32))
        image = torch.zeros(3, self.side, self.side)
        image[..., :END] = image[..., -END:] = colours
        return image, 0


def ends(images: Tensor) -> Tensor:
    """The first and the last columns of images (B, 3, side, side), (B, 3, side, 2, 4)."""
    return torch.stack([images[..., :END], images[..., -END:]], dim=-2)


def agreement(images: Tensor) -> float:
    """How far the colours of both ends of images (B, 3, side, side) agree: 1 if they are equal, 0 if independent.

    2 E[left · right] / E[left² + right²], over rows and colours, each end's colour the mean of its columns.
    """
    left, right = ends(images).mean(-1).unbind(-1)
    return (2 * (left * right).mean() / (left**2 + right**2).mean()).item()


def best_guess(noisy_ends: Tensor, t: float, reach: bool) -> Tensor:
    """The mean of the clean ends given the noisy ones, (B, 3, side, 2, 4): what the least squared error takes.

    Of n pixels x_t = (1-t)·x + t·ε of one x from N(0, c²) it is (1-t)·Σx_t / (t²/c² + n·(1-t)²).

    Args:
        noisy_ends: x_t at the ends, (B, 3, side, 2, 4).
        t: Time in (0, 1).
        reach: Whether a guess may look at the other end.
    """
    count, of_one_colour = (2 * END, (-2, -1)) if reach else (END, -1)
    guess = noisy_ends.sum(of_one_colour, keepdim=True) * (1 - t) / (t**2 / COLOUR**2 + count * (1 - t) ** 2)
    return guess.expand_as(noisy_ends)


def reach_gained(velocity: Callable[[Tensor, float], Tensor], images: Tensor, noise: Tensor) -> float:
    """How much of what the far end is worth a network makes use of: 0 for none of it, 1 for all.

    (L₁ - L) / (L₁ - L₂), where L is the squared error of the network's velocity at the ends, and L₁ and L₂ are those
    of the best guesses from one end and from both, on the same noisy images, summed over :data:`TIMES`. Below 0 it
    does worse than a perfect guess from one end.

    Args:
        velocity: Called with noisy images (B, 3, side, side) and a time; their velocity ε - x, of that shape.
        images: Clean images (B, 3, side, side).
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
