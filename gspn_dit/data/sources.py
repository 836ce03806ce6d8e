"""Sources of images by their names.

A named source is a class, or a function, that is called as `make(split=…, image_size=…, seed=…)` and gives a
:class:`~gspn_dit.data.images.ImageDataset`. It may have an attribute `only_size`, the only side of images it has. It
raises InputError for a split or a size that it does not have. A new one gets its name in one of three ways:

- a line of the table below, for a source of this package;
- `register_source("mine", "my_package.my_module:MySource")`, before the name is used;
- an entry point of the group `gspn_dit.sources` in the pyproject.toml of any installed package:
  `mine = "my_package.my_module:MySource"`. No file of this package changes.

Nothing is imported before a source is opened.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gspn_dit.errors import InputError
from gspn_dit.registry import Registry, quoted

if TYPE_CHECKING:
    from gspn_dit.data.images import ImageDataset

SOURCES = Registry(
    "gspn_dit.sources",
    {
        "digits": "gspn_dit.demo.digits:Digits",
        "photos": "gspn_dit.demo.photos:Photos",
        "scenes": "gspn_dit.demo.scenes:Scenes",
        "emoji": "gspn_dit.demo.emoji:Emoji",
    },
)


def register_source(name: str, place: str) -> None:
    """Give a name to the source at `place`, "module:class". Raises ValueError if the name is taken."""
    SOURCES.register(name, place)


def split_name(source: str) -> tuple[str, str] | None:
    """The name and the split of "digits" (its training split) or "digits:test"; None for what names no source."""
    name, colon, split = source.partition(":")
    return (name, split if colon else "train") if name in SOURCES else None


def only_size(name: str) -> int | None:
    """The only side in pixels that a named source's images come in; None if they come in several."""
    return getattr(SOURCES.load(name), "only_size", None)


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
        source: A registered name, or a folder of `class/*.jpg`. A folder of such a name is reached as `./digits`.
        image_size: Side of the square images in pixels.
        split: `train` or `test`; a folder is one split, which is called `train` here.
        seed: Seed of what is random in a named source, for example the photos' crops.
        exif_orientation: Turn a folder's images as their EXIF orientation says.

    Raises:
        InputError: If the source, its split or the size cannot be had.
    """
    if isinstance(source, str) and source in SOURCES:
        return SOURCES.load(source)(split=split, image_size=image_size, seed=seed)
    from gspn_dit.data.image_folder import ImageFolder
    from gspn_dit.data.latent_store import how_to_encode, is_unfinished_store

    if split != "train":
        raise InputError(
            "a folder is one split",
            argument="split",
            value=split,
            remedy="leave split out and give that split's own folder",
        )
    if not os.path.isdir(source):
        raise InputError(
            "no such folder",
            argument="source",
            value=str(source),
            remedy=f"give {quoted(SOURCES)} or a folder of class/*.jpg that exists",
        )
    if is_unfinished_store(source):
        raise InputError(
            "holds an unfinished latent store", argument="source", value=str(source), remedy=f"{how_to_encode(source)}"
        )
    return ImageFolder(source, image_size, exif_orientation)
