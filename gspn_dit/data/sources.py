"""Images by the name of where they come from."""

from __future__ import annotations

import os

from gspn_dit.data.image_folder import ImageFolder
from gspn_dit.data.images import ImageDataset
from gspn_dit.data.latent_store import how_to_encode, is_unfinished_store
from gspn_dit.demo.digits import Digits
from gspn_dit.demo.photos import Photos
from gspn_dit.errors import InputError


def open_images(
    source: str | os.PathLike,
    image_size: int,
    *,
    split: str = "train",
    seed: int = 0,
    exif_orientation: bool = False,
) -> ImageDataset:
    """The images of a source, as a torch Dataset of (uint8 (3, image_size, image_size), label).

    Args:
        source: `digits`, `photos`, or a folder of `class/*.jpg`.
        image_size: Side of the square images in pixels.
        split: `train` or `test`; a folder is one split, which is called `train` here.
        seed: Of the photos' crops.
        exif_orientation: Turn a folder's images as their EXIF orientation says.

    Raises:
        InputError: If the source, its split or the size cannot be had.
    """
    if source == "digits":
        return Digits(split, image_size)
    if source == "photos":
        return Photos(split, image_size, seed)
    if split != "train":
        raise InputError(f"split={split!r}: a folder is one split; leave split out and give that split's own folder")
    if not os.path.isdir(source):
        raise InputError(
            f"source={str(source)!r}: no such folder; give `digits`, `photos` or a folder of class/*.jpg that exists"
        )
    if is_unfinished_store(source):
        raise InputError(f"source={str(source)!r}: holds an unfinished latent store; {how_to_encode(source)}")
    return ImageFolder(source, image_size, exif_orientation)
