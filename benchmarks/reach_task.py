"""A made task that needs reach: images whose far ends must agree, with nothing between them.

An image is grey but for four blocks, one above the other, at its left edge and four at its right. Each block on the
left is black or white by the toss of a coin; its partner, the block that it falls on when the image is turned half
round, has the same colour. Nothing else tells the colour: not the class, not the middle. A network that does not carry
anything across the map paints two ends that agree half of the time. Partners lie up to the whole diagonal apart, along
which a line scan reaches least.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gspn_dit.data.images import SPLITS

BLOCKS = 4


class FarEnds(Dataset):
    """Images float32 (1, side, side) of -1, 0 and 1, and the one label 0; `dataset[i]` depends on split and i alone.

    Args:
        side: Pixels, a multiple of 8: a block is side / 4 high and side / 8 wide.
        split: `train` or `test`.
        count: How many there are.
    """

    def __init__(self, side: int, split: str, count: int) -> None:
        self.side, self.split, self.count = side, split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        draw = np.random.Generator(np.random.PCG64([SPLITS.index(self.split), index]))
        colours = torch.from_numpy(draw.choice(np.array([-1.0, 1.0], dtype=np.float32), BLOCKS))
        image = torch.zeros(1, self.side, self.side)
        left, right = ends(image)  # views
        left += colours[:, None, None]
        right += colours.flip(0)[:, None, None]
        return image, 0


def ends(images: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks at the left and at the right edge of (…, 1, side, side), each (…, 4, side / 4, side / 8), as views."""
    rows = images.squeeze(-3).unflatten(-2, (BLOCKS, -1))
    width = images.shape[-1] // 8
    return rows[..., :width], rows[..., -width:]


def agreement(images: Tensor) -> dict[str, float]:
    """How often the far ends of images (B, 1, side, side) agree.

    `agreement` is the share of pairs of partners that have one colour, the sign of a block's mean; 0.5 is chance.
    `all_agree` is the share of images in which all four pairs have; 1/16 is chance.
    """
    left, right = (part.mean((-1, -2)) > 0 for part in ends(images))
    agree = left == right.flip(-1)
    return {"agreement": agree.float().mean().item(), "all_agree": agree.all(-1).float().mean().item()}
