"""ADM's npz files (openai/guided-diffusion, evaluations/): samples, and the references they are compared with.

arr_0            uint8 (N, H, W, 3)              images
labels or arr_1  int (N,)                        their classes; samples only, if at all
mu, sigma        (2048,), (2048, 2048)           pool features of the whole dataset, for FID
mu_s, sigma_s    (2023,), (2023, 2023)           spatial features of the whole dataset, for sFID

Ours say more in texts, which ADM's suite does not read: `class_names` (C,); and beside statistics `features`, what
they are of (Inception's where it is missing; a classifier's are of other widths, without mu_s), and its
`weights_sha256`.
"""

from __future__ import annotations

import dataclasses
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gspn_dit.errors import InputError
from gspn_dit.evaluation.classifiers import CLASSIFIERS, INCEPTION
from gspn_dit.evaluation.moments import Statistics
from gspn_dit.storage.pictures import save_npz

POOL_FEATURES = 2048
SPATIAL_FEATURES = 7 * 17 * 17


@dataclass(frozen=True)
class Notes:
    """The texts of a file; None for what it does not say."""

    features: str | None
    weights_sha256: str | None
    class_names: list[str] | None


def read_images(path: Path, argument: str) -> tuple[np.ndarray, list[int] | None]:
    """The images of a file, uint8 (N, H, W, 3), and their labels if it has any.

    Images stored without compression, as numpy and ADM do, stay on disk and are read when they are asked for.

    Raises:
        InputError: If it is no npz file, is damaged, or holds something else.
    """
    with _opened(path, argument) as arrays:
        if "arr_0" not in arrays:
            raise InputError(
                f"no arr_0 in it (it holds {', '.join(arrays) or 'nothing'})", argument=argument, value=path
            )
        mapped = _mapped(path, "arr_0.npy")
        images = arrays["arr_0"] if mapped is None else mapped
        labels_key = "arr_1" if "labels" not in arrays and "arr_1" in arrays else "labels"
        labels = arrays.get(labels_key)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise InputError(
            f"arr_0 is {images.dtype} {images.shape}",
            argument=argument,
            value=path,
            wanted="uint8 (N, H, W, 3) with N ≥ 1",
        )
    if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise InputError(
            f"{labels_key} is {labels.dtype} {labels.shape}",
            argument=argument,
            value=path,
            wanted=f"{len(images)} class numbers",
        )
    return images, None if labels is None else labels.tolist()


def members(path: Path, argument: str) -> set[str]:
    """The names of a file's arrays. Raises :class:`InputError` if it is no npz file."""
    with _opened(path, argument) as arrays:
        return set(arrays)


def read_notes(path: Path, argument: str) -> Notes:
    """What a file says of itself. Raises :class:`InputError` if it is no npz file, or says it in no text."""
    found: dict[str, np.ndarray] = {}
    with _opened(path, argument) as arrays:
        for name, dimensions in (("features", 0), ("weights_sha256", 0), ("class_names", 1)):
            if name not in arrays:
                continue
            found[name] = arrays[name]
            if found[name].dtype.kind != "U" or found[name].ndim != dimensions:
                raise InputError(
                    f"{name} is {found[name].dtype} {found[name].shape}",
                    argument=argument,
                    value=path,
                    wanted="text",
                )
    known = (INCEPTION, *CLASSIFIERS)
    if "features" in found and found["features"].item() not in known:
        raise InputError(
            f"of features={found['features']!s}",
            argument=argument,
            value=path,
            remedy=f"known are {', '.join(known)}",
        )
    texts = {name: array.tolist() for name, array in found.items()}
    return Notes(texts.get("features"), texts.get("weights_sha256"), texts.get("class_names"))


def read_statistics(path: Path, argument: str, features: str) -> dict[str, Statistics]:
    """The statistics of a file, by the name of their mean: `mu`, `mu_s`, both or neither.

    Args:
        path: The file.
        argument: What the command calls it.
        features: What they are of: `inception`, or a classifier.

    Raises:
        InputError: If it is no npz file, is damaged, or holds one array of a pair or another shape.
    """
    widths = {("mu", "sigma"): CLASSIFIERS.load(features).num_features if features in CLASSIFIERS else POOL_FEATURES}
    widths |= {("mu_s", "sigma_s"): SPATIAL_FEATURES}
    found = {}
    with _opened(path, argument) as arrays:
        for names, width in widths.items():
            here = [name for name in names if name in arrays]
            if len(here) == 1:
                (missing,) = set(names) - set(here)
                raise InputError(
                    f"{here[0]} without {missing}", argument=argument, value=path, wanted="both, or images alone"
                )
            if here:
                mean, covariance = (arrays[name] for name in names)
                _check(path, argument, names[0], mean, (width,))
                _check(path, argument, names[1], covariance, (width, width))
                found[names[0]] = Statistics(mean.astype(np.float64), covariance.astype(np.float64))
    if "mu_s" in found and "mu" not in found:
        raise InputError(
            "mu_s and sigma_s without mu and sigma",
            argument=argument,
            value=path,
            wanted="all four, or the latter",
        )
    return found


def write_reference(
    path: Path,
    images: Iterable[np.ndarray],
    shape: tuple[int, ...],
    pool: Statistics,
    spatial: Statistics | None,
    notes: Notes,
) -> None:
    """Write a reference file, atomically, each batch of images as it comes.

    Args:
        path: The file.
        images: Batches uint8 (n, H, W, 3).
        shape: (N, H, W, 3) of all of them.
        pool: Statistics of the features of FID.
        spatial: Statistics of the 2023 spatial features, if there are any.
        notes: What it says of itself.
    """
    arrays = {"mu": pool.mu, "sigma": pool.sigma}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mu, "sigma_s": spatial.sigma}
    arrays |= {name: np.array(text) for name, text in dataclasses.asdict(notes).items() if text is not None}
    save_npz(images, shape, path, **arrays)


@contextmanager
def _opened(path: Path, argument: str) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an npz file, each read when it is asked for. Raises :class:`InputError`."""
    if not zipfile.is_zipfile(path):
        raise InputError("not a readable npz file", argument=argument, value=path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except InputError:
        raise
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"not an npz file of plain arrays ({error})", argument=argument, value=path) from error


def _mapped(path: Path, member: str) -> np.ndarray | None:
    """An array of the file, mapped into memory after its checksum was found right; None if it cannot be mapped."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(member)
        if entry.compress_type != zipfile.ZIP_STORED:
            return None
        with archive.open(entry) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return None
            shape, in_columns, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            if in_columns or dtype.hasobject or 0 in shape:
                return None
            while file.read(1 << 24):  # zipfile raises at the end if the checksum is another
                pass
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))  # a zip entry's own header: 30 bytes and these
    start += entry.header_offset + 30 + name_length + extra_length
    return np.memmap(path, dtype, "r", offset=start, shape=shape)


def _check(path: Path, argument: str, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape or not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
        raise InputError(
            f"{name} is {array.dtype} {array.shape}",
            argument=argument,
            value=path,
            wanted=f"finite floats {shape}",
        )
