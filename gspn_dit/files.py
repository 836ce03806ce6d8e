"""Files that are whole or not there, and folders that are continued only as they were begun."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gspn_dit.errors import InputError


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; it becomes `path` if the block ends well, and else goes."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the data
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: str | os.PathLike, option: str = "out", *, folder: bool = False, size: int = 0) -> None:
    """Look, before long work, whether a file or folder of that size can be written.

    Raises :class:`InputError`.
    """
    named, real = f"{option}={str(path)!r}", Path(os.path.realpath(path))
    there = next(place for place in (real if folder else real.parent, *real.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{named}: {str(there)!r} is no folder that can be written to; choose another path")
    if shutil.disk_usage(there).free < max(size, 1):
        raise InputError(f"{named}: {str(there)!r} has no room for {size} bytes; make room, or choose another path")


def save_tensors(tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read like any other file; safetensors' own is its owner's alone."""
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_new(folder: Path) -> None:
    """Raise :class:`InputError` if the folder that a command's `out` names is there already."""
    if folder.exists():
        raise InputError(f"out={str(folder)!r}: exists already; remove it or name another folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary path to make a folder at; it becomes `folder` if the block ends well, and else goes.

    Raises :class:`InputError` if there is one already.
    """
    require_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        yield Path(temporary) / folder.name
        (Path(temporary) / folder.name).rename(folder)


def write_json(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """Write a JSON file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def begin_or_continue(path: Path, settings: dict[str, Any], option: str, ignored: tuple[str, ...] = ()) -> None:
    """Write what a folder's contents are made with into it, or check that they were begun with the same.

    Args:
        path: The JSON file in that folder.
        settings: What JSON can hold.
        option: The command's option that names the folder, for the error.
        ignored: Keys that may differ.

    Raises :class:`InputError`, naming the first key that differs, with both values.
    """
    if not path.exists():
        write_json(path, settings)
        return
    try:
        begun = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): restore it, or choose another --{option}") from error
    for key, value in json.loads(json.dumps(settings)).items():
        if key not in ignored and begun.get(key) != value:
            raise InputError(
                f"{key}={_shorten(value)}: {path.parent} was begun with {key}={_shorten(begun.get(key))}; "
                f"run with the same, or choose another --{option}"
            )


def _shorten(value: object) -> str:
    """A value as it fits into one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
