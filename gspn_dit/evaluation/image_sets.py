"""What is scored and what with: images of a folder, an npz batch or a named dataset, or a reference's statistics."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gspn_dit.data import open_images
from gspn_dit.data.captions import METADATA
from gspn_dit.data.image_folder import SUFFIXES, find_images, read_square, say_left_out, to_rgb
from gspn_dit.data.images import ImageDataset, UnreadableImage
from gspn_dit.data.sources import split_name
from gspn_dit.errors import InputError
from gspn_dit.evaluation.moments import Statistics
from gspn_dit.evaluation.npz import members, read_images, read_notes, read_statistics
from gspn_dit.progress import progress

LABELS_FILE = "labels.csv"
WITH_SAMPLES = (LABELS_FILE, METADATA, "settings.json")  # what sampling writes beside its images


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, read when they are asked for.

    Args:
        source: What it was opened from.
        count: How many images there are.
        image_size: Their (height, width) in pixels.
        read: Gives image i as uint8 (3, height, width); safe to call from several threads.
        labels: The class each image was asked for, or None where that is not known.
        read_together: Gives several images as uint8 (n, 3, height, width), where that is faster than one by one.
        by_folders: Whether they come from several folders, one after the other.
        class_names: What the classes of the labels, or of some of them, are called, where that is known.
    """

    source: str
    count: int
    image_size: tuple[int, int]
    read: Callable[[int], Tensor]
    labels: list[int] | None = None
    read_together: Callable[[Sequence[int]], Tensor] | None = None
    by_folders: bool = False
    class_names: Mapping[int, str] | None = None

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Sequence[int], readers: Executor) -> Tensor:
        """The images `indices` as uint8 (n, 3, height, width), read by several threads."""
        if self.read_together is not None:
            return self.read_together(indices)
        return torch.stack(list(readers.map(self.read, indices)))


@dataclass(frozen=True)
class ReferenceStatistics:
    """What an ADM reference file holds: statistics of a whole dataset's features, and some of its images.

    Args:
        source: The file.
        features: What they are statistics of: `inception`, or the name of a classifier.
        pool: Of the features of FID.
        spatial: Of Inception's 2023 spatial features, if there are any.
        images: Those for precision and recall, if there are any.
        weights_sha256: Of the weights that gave the features, where that is known.
        class_names: As of :class:`ImageSet`.
    """

    source: str
    features: str
    pool: Statistics
    spatial: Statistics | None = None
    images: ImageSet | None = None
    weights_sha256: str | None = None
    class_names: Mapping[int, str] | None = None


def open_samples(source: str, argument: str = "samples") -> ImageSet:
    """Open a folder of images or an npz batch.

    A folder is searched with its subfolders; its `labels.csv`, if it has one, gives `file,label` for every image, the
    file relative to the folder, and may give the class's `name`. An npz holds uint8 (N, H, W, 3) as `arr_0`, and labels
    (N,) as `labels` or, as ADM writes them, `arr_1` if it has any, and may hold the `class_names`.

    Raises:
        InputError: If there is nothing there, an image cannot be read, sizes differ, or labels do not match the images.
    """
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, argument)
    if not path.exists():
        raise InputError("no such folder or npz file", argument=argument, value=source)
    if path.suffix != ".npz":
        raise InputError(argument=argument, value=source, wanted="a folder of images or an .npz file")
    if {"mu", "sigma"} & members(path, argument):
        raise InputError(
            "a reference's statistics (mu, sigma)", argument=argument, value=path, wanted="images, arr_0 alone"
        )
    return _open_npz(path, argument)


def open_reference(source: str, image_size: tuple[int, int]) -> ImageSet | ReferenceStatistics:
    """Open what samples are compared with: a folder, an npz batch, or a named dataset at the samples' size.

    An npz with `mu` and `sigma`, as ADM's reference batches have, is those statistics: ADM takes them over many more
    images than the `arr_0` beside them, which is there for precision and recall. The name of a
    source, `digits`, is its training split, which FID compares with by custom, and `digits:test` the held-out one. A
    folder of such a name is reached as `./digits`.

    Raises:
        InputError: As :func:`open_samples`; also for a named dataset if the samples are not square.
    """
    if (named := split_name(source)) is None:
        return _open_statistics(Path(source)) or open_samples(source, "reference")
    if image_size[0] != image_size[1]:
        raise InputError(
            f"its images are square, the samples are {_size(image_size)}",
            argument="reference",
            value=source,
            wanted="square samples, or a folder of references",
        )
    name, split = named
    try:
        dataset = open_images(name, image_size[0], split=split)
    except InputError as error:
        raise InputError(
            f"not at the samples' size {_size(image_size)} ({error})", argument="reference", value=source
        ) from error
    return of_dataset(source, dataset)


def of_dataset(source: str, dataset: ImageDataset) -> ImageSet:
    """The images of a dataset, whose labels are not asked for."""
    size, names = (dataset.image_size, dataset.image_size), dict(enumerate(dataset.class_names))
    return ImageSet(source, len(dataset), size, lambda i: dataset[i][0], class_names=names)


def open_cropped(folder: str, image_size: int, argument: str) -> ImageSet:
    """The images of a folder and its subfolders, of any sizes, cropped to squares of that side as ADM does.

    Raises :class:`InputError` if there are none.
    """
    files = image_files(Path(folder), argument)

    def read(index: int) -> Tensor:
        try:
            return read_square(str(files[index]), image_size)[0]
        except UnreadableImage as error:
            raise _unreadable(files[index], error.reason) from error

    return ImageSet(folder, len(files), (image_size, image_size), read)


def image_files(folder: Path, argument: str) -> list[Path]:
    """A folder's images at any depth, in the order in which they are scored; other files are told.

    Raises :class:`InputError` if there are none.
    """
    if not folder.is_dir():
        raise InputError("no such folder", argument=argument, value=folder)
    images, others = find_images(folder)
    say_left_out(folder, [path for path in others if os.path.basename(path) not in WITH_SAMPLES])
    if not images:
        raise InputError(
            "no images in it", argument=argument, value=folder, wanted=f"files ending in {' '.join(SUFFIXES)}"
        )
    return sorted(map(Path, images))


def _open_folder(folder: Path, argument: str) -> ImageSet:
    files = image_files(folder, argument)
    first = _header_size(files[0])
    for file in progress(files, desc=f"checking {argument}", unit="image", leave=False):
        if (size := _header_size(file)) != first:
            raise InputError(
                f"images differ in size, {files[0].name} is {_size(first)} and {file.name} {_size(size)}",
                argument=argument,
                value=folder,
                wanted="one size",
            )
    labels, names = _read_labels(folder, files)
    return ImageSet(
        str(folder),
        len(files),
        first,
        lambda i: _read_file(files[i]),
        labels,
        by_folders=len({file.parent for file in files}) > 1,
        class_names=names,
    )


def _header_size(file: Path) -> tuple[int, int]:
    """(height, width) from the file's header."""
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except Exception as error:
        raise _unreadable(file, error) from error


def _read_file(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
    except Exception as error:  # Pillow's decoders raise a different class for each way a file can be broken
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception | str) -> InputError:
    return InputError(
        f"{file}: not a readable image ({' '.join(str(error).split())})", remedy="remove it or make it again"
    )


def _read_labels(folder: Path, files: list[Path]) -> tuple[list[int] | None, dict[int, str] | None]:
    """One label an image, in the order of the files, and the classes' names, from `labels.csv`; None for what lacks."""
    path = folder / LABELS_FILE
    if not path.exists():
        return None, None
    with path.open(newline="") as lines:
        rows = csv.DictReader(lines)
        if not {"file", "label"} <= set(rows.fieldnames or ()):
            raise InputError(f"{path}: its header is {','.join(rows.fieldnames or ())!r}", wanted="file,label")
        label_of, name_of = {}, {}
        for row in rows:
            label_of[row["file"]] = row["label"]
            name_of[row["label"]] = row.get("name")
    names = [file.relative_to(folder).as_posix() for file in files]
    if unlabelled := [name for name in names if name not in label_of]:
        raise InputError(f"{path}: no label for {unlabelled[0]} ({len(unlabelled)} of {len(names)} images have none)")
    if missing := sorted(label_of.keys() - set(names)):
        raise InputError(f"{path}: {missing[0]} has a label but is not in the folder ({len(missing)} such)")
    if wrong := [name for name in names if not (label_of[name] or "").isdecimal()]:
        raise InputError(f"{path}: label={label_of[wrong[0]]!r} of {wrong[0]}", wanted="a class number")
    named = {int(label): name for label, name in name_of.items() if name}
    return [int(label_of[name]) for name in names], named or None


def _open_npz(path: Path, argument: str) -> ImageSet:
    images, labels = read_images(path, argument)
    names = read_notes(path, argument).class_names

    def read(index: int) -> Tensor:
        return torch.from_numpy(np.array(images[index])).permute(2, 0, 1)

    class_names = None if names is None else dict(enumerate(names))
    return ImageSet(str(path), len(images), images.shape[1:3], read, labels, class_names=class_names)


def _open_statistics(path: Path) -> ReferenceStatistics | None:
    """A file with statistics; None if there is no such file or it has none."""
    if path.suffix != ".npz" or not path.is_file():
        return None
    if not {"mu", "sigma", "mu_s", "sigma_s"} & members(path, "reference"):
        return None
    notes = read_notes(path, "reference")
    features = notes.features or "inception"
    statistics = read_statistics(path, "reference", features)
    images = _open_npz(path, "reference") if "arr_0" in members(path, "reference") else None
    return ReferenceStatistics(
        str(path),
        features,
        statistics["mu"],
        statistics.get("mu_s"),
        images,
        notes.weights_sha256,
        None if notes.class_names is None else dict(enumerate(notes.class_names)),
    )


def _size(image_size: tuple[int, int]) -> str:
    height, width = image_size
    return f"{height}x{width}"
