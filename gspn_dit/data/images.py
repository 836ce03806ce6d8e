"""What every image source is: a map from an index to (image, label), the same each time it is asked."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gspn_dit.errors import InputError

SPLITS = ("train", "test")


class UnreadableImage(Exception):
    """An image file that is there but cannot be decoded; `path` names it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class ImageDataset(Dataset):
    """Square RGB images with class labels; `dataset[i]` depends on nothing but the dataset's arguments and i.

    It is a :class:`~gspn_dit.data.source.Source`. Whether an image is mirrored the training stream draws, so that a
    resumed run draws the same.
    A source defines :meth:`load` and `__len__`, and sets the attributes.

    Attributes:
        class_names: Name of each label.
        image_size: Side of the images in pixels.
        unreadable: Paths of the files that `dataset[i]` found unreadable so far (in this process).
    """

    latent_shape = None
    condition_names = ("class_labels",)

    def __init__(self, class_names: list[str], image_size: int) -> None:
        self.class_names = class_names
        self.image_size = image_size
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int) -> tuple[Tensor, int]:
        """Image `index` as uint8 (3, image_size, image_size), and its label. Raises :class:`UnreadableImage`."""
        raise NotImplementedError

    def load_tagged(self, index: int) -> tuple[Tensor, int, bool]:
        """As :meth:`load`, and whether the file has an EXIF orientation other than upright."""
        return *self.load(index), False

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """As :meth:`load`, but in the place of an unreadable file the next readable one, with a warning naming it.

        Raises:
            InputError: If no file at all is readable.
        """
        return self.load_readable(index)[:2]

    def load_readable(self, index: int) -> tuple[Tensor, int, int]:
        """As `dataset[index]`, and the index of the image that it is."""
        if index >= len(self):
            raise IndexError(f"image {index} of a dataset of {len(self)}")
        for offset in range(len(self)):
            found = (index + offset) % len(self)
            try:
                return *self.load(found), found
            except UnreadableImage as error:
                if error.path not in self.unreadable:
                    self.unreadable.add(error.path)
                    warnings.warn(f"unreadable image {len(self.unreadable)}, skipped: {error}", stacklevel=3)
        raise InputError(
            f"none of the {len(self)} images can be read, among them {min(self.unreadable)}", remedy="restore them"
        )

    def sample(self, index: int, flip: bool = False, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """`image` uint8 (3, image_size, image_size), mirrored if asked, and `class_labels` () long."""
        image, label = self[index]
        return {"image": image.flip(-1) if flip else image, "class_labels": torch.tensor(label)}


def check_split(split: str) -> None:
    """Raise :class:`InputError` unless the split is `train` or `test`."""
    if split not in SPLITS:
        raise InputError(argument="split", value=split, wanted=f"one of {', '.join(SPLITS)}")
