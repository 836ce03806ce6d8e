"""Captioned pictures as samples of a training whose text encoders run along, and their sizes as SD-XL is told them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from gspn_dit.data.captions import CaptionedFolder, CaptionedImages, some_captions, warn_of_long_captions
from gspn_dit.data.image_folder import crop_corner
from gspn_dit.text.teacher import tokenizers


class CaptionedSource:
    """A :class:`~gspn_dit.data.source.Source` whose condition is a caption, in words, and what SD-XL is told of a size.

    Args:
        images: The pictures.

    Attributes:
        class_names: Theirs.
    """

    latent_shape = None
    condition_names = ("caption", "time_ids")

    def __init__(self, images: CaptionedImages) -> None:
        self.images = images
        self.class_names = images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, flip: bool = False, names: Collection[str] | None = None) -> dict[str, Any]:
        """`image` uint8 (3, H, W), `caption` str and `time_ids` (6,) float32, of the picture that could be read.

        Sizes that are not in `names` are left out: a file is opened once more for them.
        """
        image, _, found = self.images.load_readable(index)
        sample = {"image": image.flip(-1) if flip else image, "caption": self.images.caption(found)}
        if names is None or "time_ids" in names:
            sample["time_ids"] = size_condition(self.images, found)
        return sample


def warn_of_cut_captions(pipe: DiffusionPipeline, caption: Callable[[int], str], count: int) -> None:
    """Warn if captions have more tokens than a pipeline's text encoders read.

    Args:
        pipe: The pipeline.
        caption: Says what picture `index` shows.
        count: Of the pictures; some of their captions are looked at.
    """
    remedy = "shorten them, for the pipeline reads no more"
    warn_of_long_captions(some_captions(caption, count), tokenizers(pipe)[0], remedy)


def size_condition(images: CaptionedImages, index: int) -> Tensor:
    """Six numbers (6,) float32 about picture `index`: height and width before it was resized, corner and size of the
    crop (SD-XL, arXiv 2307.01952, section 2.2). A picture that was made at its size has lost nothing.
    """
    side = images.image_size
    if not isinstance(images, CaptionedFolder):
        return size_of_whole(side)
    with Image.open(images.paths[index]) as file:
        width, height = file.size
    top, left = crop_corner(width, height, side)
    return torch.tensor([height, width, top, left, side, side], dtype=torch.float32)


def size_of_whole(side: int) -> Tensor:
    """As :func:`size_condition`, of a square picture that was neither resized nor cropped."""
    return torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32)
