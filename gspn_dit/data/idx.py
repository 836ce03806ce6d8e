"""idx files, as MNIST and Fashion-MNIST are shipped: `train-images-idx3-ubyte.gz` and its like.

A file is a magic number (two zero bytes, the type of a value, the number of axes), the length of each axis as a 32-bit
big-endian number, and the values. It may be compressed by gzip.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from gspn_dit.errors import InputError

UNSIGNED_BYTE = 0x08
SPLITS = {"train": "train", "test": "t10k"}  # what a split's files are called
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def is_idx_folder(folder: str | os.PathLike) -> bool:
    """Whether a folder holds images in an idx file."""
    return any(_find(folder, split, IMAGES) is not None for split in SPLITS)


def read_split(folder: str | os.PathLike, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images uint8 (N, H, W) and labels uint8 (N,) of `train` or `test`; None if the folder has no such images.

    Raises :class:`InputError` for a file that is missing or not as it should be, and for numbers that differ.
    """
    path = _find(folder, split, IMAGES)
    if path is None:
        return None
    labels_path = _find(folder, split, LABELS)
    if labels_path is None:
        raise InputError(
            f"has {path.name} and no {SPLITS[split]}-{LABELS}.gz beside it",
            argument="source",
            value=os.fspath(folder),
            remedy="restore it",
        )
    images, labels = read_idx(path, axes=3), read_idx(labels_path, axes=1)
    if images.size == 0:
        raise InputError(f"{path}: holds no images ({' × '.join(map(str, images.shape))})", remedy="restore it")
    if len(images) != len(labels):
        raise InputError(
            f"{path.name} has {len(images):,} images, {labels_path.name} {len(labels):,} labels",
            argument="source",
            value=os.fspath(folder),
            remedy="restore both",
        )
    return images, labels


def read_idx(path: str | os.PathLike, axes: int) -> np.ndarray:
    """The array in an idx file of bytes, with so many axes; it is read-only.

    Raises :class:`InputError` if the file is no such thing, damaged, or shorter or longer than it says.
    """

    def refuse(problem: str) -> InputError:
        return InputError(f"{path}: {problem}", remedy="restore it")

    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise refuse(f"cannot be read ({' '.join(str(error).split())})") from error
    header = 4 * (1 + axes)
    if len(data) < header:
        raise refuse(f"ends after {len(data)} bytes")
    zeros, kind, found = struct.unpack(">HBB", data[:4])
    if (zeros, kind, found) != (0, UNSIGNED_BYTE, axes):
        wanted = f"{UNSIGNED_BYTE << 8 | axes:08x}, bytes with {axes} {'axis' if axes == 1 else 'axes'}"
        raise refuse(f"begins with {data[:4].hex()}, no idx file's magic number here (wanted {wanted})")
    shape = struct.unpack(f">{axes}I", data[4:header])
    count = int(np.prod(shape, dtype=np.int64))
    if len(data) - header != count:
        raise refuse(f"holds {len(data) - header:,} values and says {' × '.join(map(str, shape))} = {count:,}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _find(folder: str | os.PathLike, split: str, what: str) -> Path | None:
    """The file of a split's images or labels, compressed or not."""
    stem = Path(folder) / f"{SPLITS[split]}-{what}"
    return next((path for path in (stem.with_name(f"{stem.name}.gz"), stem) if path.is_file()), None)
