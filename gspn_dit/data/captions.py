"""Pictures with a caption each: folders of them, and what every captioned source is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gspn_dit.data.image_folder import find_images, read_square
from gspn_dit.data.images import ImageDataset
from gspn_dit.data.latent_store import how_to_encode, is_unfinished_store
from gspn_dit.data.sources import SOURCES
from gspn_dit.errors import InputError, warn
from gspn_dit.registry import quoted
from gspn_dit.text.tokens import begin_of, tokenize, too_long

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METADATA = "metadata.jsonl"  # as Hugging Face's imagefolder calls the file of captions
NO_CLASSES = ("image",)  # the class names of pictures that have no classes
_NAMED = 3  # how many files a message names
_LOOKED_AT = 512  # captions, before they are read
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


class CaptionedImages(ImageDataset):
    """Square RGB images with a caption each; `caption(i)` depends on nothing but the dataset's arguments and i.

    A source defines :meth:`load`, :meth:`caption` and `__len__`. One without classes has the one class name "image",
    and 0 for every label.

    Attributes:
        mirrors: Whether the mirror image of a picture can be what the caption says. Where not, none is mirrored.
    """

    mirrors = True

    def __init__(self, class_names: Sequence[str] = NO_CLASSES, image_size: int = 64) -> None:
        super().__init__(list(class_names), image_size)

    def caption(self, index: int) -> str:
        """What image `index` shows, in words."""
        raise NotImplementedError


class CaptionedFolder(CaptionedImages):
    """Picture files and their captions, cropped to squares as :class:`~gspn_dit.data.image_folder.ImageFolder` does.

    Args:
        paths: Of the pictures.
        captions: One for each.
        image_size: Side in pixels of the square the images are cropped to.
        exif_orientation: Turn images as their EXIF orientation says.
    """

    def __init__(
        self, paths: Sequence[str], captions: Sequence[str], image_size: int, exif_orientation: bool = False
    ) -> None:
        if image_size < 1:
            raise InputError(argument="image_size", value=image_size, wanted="a positive number of pixels")
        super().__init__(image_size=image_size)
        self.paths, self.captions, self.exif_orientation = list(paths), list(captions), exif_orientation

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> tuple[Tensor, int]:
        return self.load_tagged(index)[:2]

    def load_tagged(self, index: int) -> tuple[Tensor, int, bool]:
        pixels, is_tagged = read_square(self.paths[index], self.image_size, self.exif_orientation)
        return pixels, 0, is_tagged

    def caption(self, index: int) -> str:
        return self.captions[index]


def open_captioned(
    source: str | os.PathLike,
    image_size: int,
    *,
    split: str = "train",
    seed: int = 0,
    exif_orientation: bool = False,
) -> CaptionedImages:
    """The captioned images of a source.

    Args:
        source: A registered name whose images have captions; a folder of pictures, at any depth, with a `.txt` of the
            same name beside each, or with a metadata.jsonl in it; or such a jsonl file itself, of any name. Each of its
            lines is `{"file_name": "a.png", "text": "a red 3"}`, the file named from the jsonl's folder. A picture may
            be in several lines.
        image_size: Side of the square images in pixels.
        split: `train` or `test`; a folder is one split, which is called `train` here.
        seed: Seed of what is random in a named source.
        exif_orientation: Turn a folder's images as their EXIF orientation says.

    Raises:
        InputError: The source cannot be had, or a caption is missing, empty or cannot be read.
    """
    if isinstance(source, str) and source in SOURCES:
        images = SOURCES.load(source)(split=split, image_size=image_size, seed=seed)
        if not isinstance(images, CaptionedImages):
            raise InputError(
                "its images have no captions", argument="source", value=source, wanted="a captioned source or a folder"
            )
        return images
    if split != "train":
        raise InputError(
            "a folder is one split",
            argument="split",
            value=split,
            remedy="leave split out and give that split's own folder",
        )
    place = Path(source)
    table = place if place.is_file() else place / METADATA
    if not table.is_file() and not place.is_dir():
        raise InputError(
            "no such folder",
            argument="source",
            value=os.fspath(source),
            remedy=f"give {quoted(SOURCES)}, a folder of pictures with captions or a jsonl that exists",
        )
    if is_unfinished_store(place):
        raise InputError(
            "holds an unfinished latent store", argument="source", value=os.fspath(source), remedy=how_to_encode(place)
        )
    paths, captions = read_table(table) if table.is_file() else read_beside(place)
    return CaptionedFolder(paths, captions, image_size, exif_orientation)


def read_beside(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Paths of a folder's pictures, in order, and the captions in the `.txt` files beside them.

    Raises :class:`InputError` if there are no pictures, or a caption is missing, empty or no text.
    """
    paths, _ = find_images(folder)
    about = {"argument": "source", "value": os.fspath(folder)}
    if not paths:
        raise InputError("no pictures in it", **about)
    captions: list[str | None] = [_caption_beside(path) for path in paths]
    if missing := [path for path, caption in zip(paths, captions, strict=True) if caption is None]:
        raise InputError(
            f"{len(missing)} of {len(paths)} pictures have no caption: {_first(missing)}",
            **about,
            remedy=f"put NAME.txt beside each, or a {METADATA} into the folder",
        )
    if empty := [path for path, caption in zip(paths, captions, strict=True) if not caption]:
        raise InputError(f"the caption of {len(empty)} pictures is empty: {_first(empty)}", **about)
    return paths, [caption for caption in captions if caption is not None]


def read_table(path: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Paths of the pictures that a jsonl names, and their captions. Raises :class:`InputError`, naming the line."""
    path = Path(path)
    rows = read_rows(path)
    paths, captions = [os.path.join(path.parent, file) for file, _ in rows], [caption for _, caption in rows]
    if missing := [file for file in dict.fromkeys(paths) if not os.path.isfile(file)]:
        raise InputError(
            f"{len(missing)} of the pictures that {path} names are not there: {_first(missing)}",
            argument="source",
            value=os.fspath(path),
        )
    if path.name == METADATA and (others := set(find_images(path.parent)[0]) - set(paths)):
        warn(f"{path.parent}: {len(others)} pictures are not in {METADATA} and left out, such as {min(others)}")
    return paths, captions


def read_rows(path: str | os.PathLike) -> list[tuple[str, str]]:
    """File names and captions of a jsonl's lines, whether the files are there or not.

    Raises :class:`InputError`, naming the line, or if it has none.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines, which also splits within JSON
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is no UTF-8 text ({error.reason})", argument="source", value=os.fspath(path)
        ) from None
    rows = [_row(line, f"line {number} of {path}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise InputError("no lines in it", argument="source", value=os.fspath(path))
    return rows


def some_captions(caption: Callable[[int], str], count: int) -> list[str]:
    """Captions to judge all by: those of some of `count` images, spread over them.

    Args:
        caption: Says what image `index` shows.
        count: Of all images.
    """
    some = min(_LOOKED_AT, count)
    return [caption(k * count // some) for k in range(some)]


def warn_of_long_captions(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, remedy: str) -> None:
    """Warn if some of the captions that are looked at have more tokens than the tokenizer's `model_max_length`.

    Args:
        captions: As :func:`some_captions` chooses them.
        tokenizer: Of transformers.
        remedy: What to do about it.
    """
    if cut := too_long(tokenizer, captions):
        caption, length = cut[0]
        warn(
            f"{len(cut)} of {len(captions)} captions looked at are cut to {tokenizer.model_max_length} tokens, such as "
            f"{begin_of(caption)} of {length}; {remedy}"
        )


def check_mirrored(source: str, captions: Sequence[str]) -> None:
    """Judge whether a source's images may be mirrored beside their captions; warn if captions say left or right.

    Args:
        source: A name, or where the images are from.
        captions: As :func:`some_captions` chooses them.

    Raises:
        InputError: Of the argument `horizontal_flip`: it is a named source whose captions are never true of mirrored
            images.
    """
    if source in SOURCES and not getattr(SOURCES.load(source), "mirrors", True):
        raise InputError(
            f"mirrored images of {source} are not what their captions say",
            argument="horizontal_flip",
            value=True,
            remedy="give false",
        )
    if sided := [caption for caption in captions if _SIDES.search(caption)]:
        warn(
            f"{len(sided)} of {len(captions)} captions looked at say left or right, such as {begin_of(sided[0])}, "
            "which is not true of a mirrored image; give false for horizontal_flip"
        )


class TokenizedCaptions:
    """A captioned source whose samples hold the tokens of their captions: a :class:`~gspn_dit.data.source.Source`.

    Args:
        images: The source.
        tokenizer: Of transformers, with `model_max_length` L set.
    """

    latent_shape = None
    condition_names = ("class_labels", "input_ids")

    def __init__(self, images: CaptionedImages, tokenizer: PreTrainedTokenizerBase) -> None:
        self.images, self.tokenizer = images, tokenizer
        self.class_names = images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def caption(self, index: int) -> str:
        """What image `index` shows, in words."""
        return self.images.caption(index)

    def sample(self, index: int, flip: bool = False, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """`image` uint8 (3, H, W), `class_labels` () and `input_ids` (L,) long, of the image that could be read."""
        image, label, found = self.images.load_readable(index)
        return {
            "image": image.flip(-1) if flip else image,
            "class_labels": torch.tensor(label),
            "input_ids": tokenize(self.tokenizer, [self.images.caption(found)])[0],
        }


def _row(line: str, place: str) -> tuple[str, str]:
    """File name and caption of a line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is no JSON ({error})", argument="source") from None
    for key in ("file_name", "text"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise InputError(f"{place} has no {key}", argument="source", wanted='{"file_name": …, "text": …}')
    if not (caption := _one_line(row["text"])):
        raise InputError(f"the caption in {place} is empty", argument="source")
    return row["file_name"], caption


def _caption_beside(path: str) -> str | None:
    """The text in the .txt beside a picture; None if there is none."""
    file = Path(path).with_suffix(".txt")
    try:
        return _one_line(file.read_text(encoding="utf-8")) if file.is_file() else None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 text ({error.reason})", argument="source") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _first(paths: Sequence[str]) -> str:
    return ", ".join(map(str, paths[:_NAMED])) + (", …" if len(paths) > _NAMED else "")
