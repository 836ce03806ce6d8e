"""How a picture becomes what a classifier is given when it is judged: resized, cropped at its centre, normalised.

The numbers are those of timm's transform, so that accuracies compare with timm's results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from gspn_dit.data.pictures import Pictures, readable
from gspn_dit.errors import not_none


@dataclass(frozen=True)
class Preparation:
    """What a classifier's images are like.

    Args:
        image_size: Side in pixels of the square.
        mean: What is subtracted from each channel, of values from 0 to 1.
        std: What each channel is then divided by.
        crop_pct: Share of the image's shorter side that the centred crop keeps.
        interpolation: How an image is resampled.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    @classmethod
    def of(cls, pretrained_cfg: Mapping[str, Any]) -> Self:
        """That of a model's `pretrained_cfg`."""
        mean, std = (tuple(map(float, pretrained_cfg[key])) for key in ("mean", "std"))
        side = int(pretrained_cfg["input_size"][-1])
        return cls(side, mean, std, float(pretrained_cfg["crop_pct"]), pretrained_cfg["interpolation"])

    def changed(self, image_size: int | None, crop_pct: float | None, interpolation: str | None) -> Self:
        """The same with what is given in place of what it has."""
        given: dict[str, Any] = {"image_size": image_size, "crop_pct": crop_pct, "interpolation": interpolation}
        return replace(self, **{key: value for key, value in given.items() if value is not None})

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return len(self.mean)

    def __call__(self, picture: Image.Image) -> Tensor:
        """A picture of any size and mode as float32 (channels, image_size, image_size)."""
        picture, side = self.mode(picture), self.image_size
        shorter, longer = sorted(picture.size)
        wanted = math.floor(side / self.crop_pct)
        if shorter != wanted:
            other = int(wanted * longer / shorter)
            size = (wanted, other) if picture.width <= picture.height else (other, wanted)
            picture = picture.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = round((picture.width - side) / 2), round((picture.height - side) / 2)
        pixels = np.array(picture.crop((left, top, left + side, top + side)))
        return self.normalise(torch.from_numpy(pixels).view(side, side, -1).permute(2, 0, 1)).contiguous()

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (…, channels, H, W) to float32, as the transform does."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)

    def takes_as_they_are(self, pictures: Pictures) -> bool:
        """Whether pictures are in memory and neither resized nor cropped."""
        array, size = pictures.array, self.image_size
        return array is not None and array.shape[1:] == (self.channels, size, size) and self.crop_pct == 1

    def mode(self, picture: Image.Image) -> Image.Image:
        """The picture in grey or in RGB, as the classifier takes it."""
        return picture.convert("L" if self.channels == 1 else "RGB")


class Prepared(Dataset):
    """Pictures as a classifier is given them when it is judged; those of a batch are asked for together.

    Args:
        pictures: What is judged.
        preparation: How.
    """

    def __init__(self, pictures: Pictures, preparation: Preparation) -> None:
        self.pictures, self.preparation = pictures, preparation
        self.in_memory = preparation.takes_as_they_are(pictures)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Items together: float32 (B, channels, H, W) and int64 (B,)."""
        if self.in_memory:
            images = self.preparation.normalise(not_none(self.pictures.array)[list(indices)])
            return images, torch.tensor([self.pictures.label(index) for index in indices])
        read = [readable(self.pictures, index) for index in indices]
        images = torch.stack([self.preparation(picture) for picture, _ in read])
        return images, torch.tensor([label for _, label in read])

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """They are together already."""
        return batch

    def shares(self, batch_size: int, rank: int, processes: int) -> Sequence[list[int]]:
        """The batches of one of several processes, which have the pictures in turn."""
        mine = range(rank, len(self), processes)
        return [list(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size)]
