"""Labelled pictures to classify: as they are stored, before they are cropped, resized and altered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gspn_dit.data.idx import is_idx_folder, read_split
from gspn_dit.data.image_folder import ImageFolder, to_rgb
from gspn_dit.data.images import ImageDataset, UnreadableImage
from gspn_dit.data.sources import SOURCES, only_size, open_images
from gspn_dit.errors import InputError, warn
from gspn_dit.registry import quoted

VALIDATION_FOLDERS = ("val", "validation", "test")


class Pictures(Protocol):
    """Pictures by index, the same each time they are asked for.

    Attributes:
        class_names: Name of each class.
        channels: 1 for grey pictures, 3 for RGB.
        array: All of them, uint8 (N, channels, H, W), where they are in memory and of one size; else None.
    """

    class_names: list[str]
    channels: int

    @property
    def array(self) -> Tensor | None: ...

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """The class of picture `index`."""
        ...

    def picture(self, index: int) -> Image.Image:
        """Picture `index`, of mode L or RGB. Raises :class:`UnreadableImage`."""
        ...


class ArrayPictures:
    """Pictures in memory.

    Args:
        array: uint8 (N, channels, H, W).
        labels: int64 (N,).
        class_names: Name of each class.
    """

    def __init__(self, array: Tensor, labels: Tensor, class_names: list[str]) -> None:
        self.array, self.labels, self.class_names = array, labels, class_names
        self.channels = array.shape[1]

    def __len__(self) -> int:
        return len(self.array)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def picture(self, index: int) -> Image.Image:
        pixels = self.array[index]
        return Image.fromarray((pixels[0] if self.channels == 1 else pixels.permute(1, 2, 0)).numpy())


class FolderPictures:
    """The images of `root/class/`, whole, as :class:`~gspn_dit.data.image_folder.ImageFolder` finds them.

    Args:
        root: The folder.

    Raises :class:`InputError` as that does.
    """

    channels = 3
    array = None

    def __init__(self, root: str | os.PathLike) -> None:
        folder = ImageFolder(root, image_size=1)
        self.class_names, self.paths, self.labels = folder.class_names, folder.paths, folder.labels

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int) -> int:
        return self.labels[index]

    def picture(self, index: int) -> Image.Image:
        return open_picture(self.paths[index])


class SourcePictures:
    """The images of a named source, as it crops them.

    Args:
        images: The source.
    """

    channels = 3
    array = None

    def __init__(self, images: ImageDataset) -> None:
        self.images, self.class_names = images, images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> int:
        return self.images[index][1]

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index][0].permute(1, 2, 0).numpy())


def open_picture(path: str | os.PathLike) -> Image.Image:
    """A picture file, as RGB and not turned. Raises :class:`UnreadableImage`."""
    try:
        with Image.open(path) as file:
            file.load()
            return to_rgb(file)
    except Exception as error:  # Pillow's decoders raise a different class for each way a file can be broken
        raise UnreadableImage(os.fspath(path), " ".join(str(error).split()) or type(error).__name__) from error


def readable(pictures: Pictures, index: int) -> tuple[Image.Image, int]:
    """Picture `index` and its class, or the next one that can be read, with a warning.

    Raises :class:`InputError` if there is none.
    """
    for offset in range(len(pictures)):
        place = (index + offset) % len(pictures)
        try:
            return pictures.picture(place), pictures.label(place)
        except UnreadableImage as error:
            warn(f"unreadable image, skipped: {error}")
    raise InputError(f"none of the {len(pictures)} images can be read", argument="source", remedy="restore them")


def open_training(
    source: str, image_size: int, class_names: list[str] | None = None, validation: str | None = None
) -> tuple[Pictures, Pictures | None]:
    """The pictures to learn from and those to be judged by, None if there are none.

    Args:
        source: A named source; a folder of idx files; or a folder with `train/` and `val/` in it, each of
            `class/*.jpg`, where with `validation` the folder itself may be that of the classes.
        image_size: Side in pixels of what is learned from; some named sources are made at that size.
        class_names: Names of the classes, for idx files.
        validation: A folder of `class/*.jpg`.

    Raises:
        InputError: If they cannot be had, or do not fit each other.
    """
    if class_names is not None and (source in SOURCES or not is_idx_folder(source)):
        raise InputError("these data have names of their own", argument="class_names", remedy="leave it out")
    training = _open_split(source, "train", image_size, class_names)
    if training is None:
        raise InputError("has test images and no training images", argument="source", value=source)
    if validation is None:
        judged = _open_split(source, "test", image_size, class_names or training.class_names)
    else:
        judged = open_judged(validation)
    if judged is not None and judged.class_names != training.class_names:
        differ = sorted(set(judged.class_names) ^ set(training.class_names))
        raise InputError(
            f"its classes are not those of the training images ({', '.join(differ[:3])})",
            argument="source" if validation is None else "validation",
            value=source if validation is None else validation,
        )
    return training, judged


def open_judged(source: str, image_size: int = 0, class_names: list[str] | None = None) -> Pictures:
    """The pictures that a classifier is judged by.

    Args:
        source: As for :func:`open_training`, whose validation pictures these are; or a folder of `class/*.jpg`.
        image_size: Side in pixels of the images of a named source that has several.
        class_names: Names of the classes, for idx files.

    Raises :class:`InputError` if they cannot be had.
    """
    if (found := _open_split(source, "test", image_size, class_names)) is not None:
        return found
    return FolderPictures(source)


def _open_split(source: str, split: str, image_size: int, class_names: list[str] | None) -> Pictures | None:
    if source in SOURCES:
        return _of_named(source, split, image_size)
    if not os.path.isdir(source):
        raise InputError(
            "no such folder",
            argument="source",
            value=source,
            remedy=f"give {quoted(SOURCES)}, a folder with train/ and val/, or a folder of idx files",
        )
    if is_idx_folder(source):
        return _of_idx(source, split, class_names)
    if split == "train":
        inner = Path(source) / "train"
        return FolderPictures(inner if inner.is_dir() else source)
    found = next((path for name in VALIDATION_FOLDERS if (path := Path(source) / name).is_dir()), None)
    return FolderPictures(found) if found is not None and (Path(source) / "train").is_dir() else None


def _of_named(source: str, split: str, image_size: int) -> Pictures:
    images = open_images(source, only_size(source) or image_size, split=split)
    array, labels = getattr(images, "images", None), getattr(images, "labels", None)
    if isinstance(array, Tensor) and isinstance(labels, Tensor):
        return ArrayPictures(array, labels, images.class_names)
    return SourcePictures(images)


def _of_idx(source: str, split: str, class_names: list[str] | None) -> Pictures | None:
    read = read_split(source, split)
    if read is None:
        return None
    images, labels = read
    most = int(labels.max(initial=0)) + 1
    names = class_names or [str(label) for label in range(most)]
    if len(names) < most:
        raise InputError(
            f"the {split} labels go up to {most - 1}",
            argument="class_names",
            value=class_names,
            wanted=f"{most} names or more",
        )
    array = torch.from_numpy(np.array(images)).unsqueeze(1)
    return ArrayPictures(array, torch.from_numpy(labels.astype(np.int64)), names)
