"""Where a command's images go: a folder that is begun or continued, hidden where one file is made of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from gspn_dit.devices import memory_of
from gspn_dit.errors import InputError, not_none
from gspn_dit.inference.sample_folder import SETTINGS_FILE, finished_images, image_file
from gspn_dit.storage.files import LOCK_FILE, alone_in, check_begun, check_place, in_bytes, is_stream

if TYPE_CHECKING:
    from gspn_dit.commands.sampling import ImagesOut

_LEAST_FILE = 4096  # bytes that an image takes on a disk: a block
logger = logging.getLogger(__name__)


def prepare_folders(
    options: ImagesOut,
    settings: dict[str, Any],
    stack: ExitStack,
    ignored: tuple[str, ...],
    absent: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Make the outputs' folders, and lock the folder of images until the stack is left; another process is waited for.

    `ignored` and `absent` are those of :func:`~gspn_dit.storage.files.check_begun`.

    Raises :class:`InputError` if a folder that was asked for was begun with other settings.
    """
    for folder in output_folders(options).values():
        if folder != options.folder:
            folder.mkdir(parents=True, exist_ok=True)
    if options.single_files:  # before it waits for another process
        check_begun(options.folder / SETTINGS_FILE, settings, "out", ignored, absent)
    else:
        stack.callback(remove_if_empty, options.folder)
    stack.enter_context(alone_in(options.folder, partial(say_who, options.folder)))


def say_who(folder: Path, holder: str) -> None:
    """Tell the person whom this process waits for."""
    logger.info(f"{holder} is drawing into {folder}; waiting for its end", extra={"stderr": True})


def remove_if_empty(folder: Path) -> None:
    """Remove a hidden folder, unless it holds what a cut run goes on from, or another's lock."""
    with suppress(OSError):
        folder.rmdir()


def clear(folder: Path) -> None:
    """Remove what is in a hidden folder of images, but for its lock."""
    for path in folder.iterdir():
        if path.name != LOCK_FILE:
            path.unlink()


def output_folders(options: ImagesOut) -> dict[str, Path]:
    """The folders that `out` and `npz` are written to, of those that are given."""
    folders = {}
    if options.out is not None and not is_stream(options.out):
        folders["out"] = options.folder if options.single_files else Path(options.out).parent
    if options.npz_file is not None:
        folders["npz"] = Path(options.npz_file).parent
    return folders


def check_outputs(options: ImagesOut, count: int) -> None:
    """Raise :class:`InputError` if `count` images cannot be written, or old images would stay among the new."""
    finished = finished_images(options.folder, below=count)
    size = (count - len(finished)) * _LEAST_FILE
    for key in output_folders(options):
        check_place(getattr(options, key), key, folder=key == "out" and options.single_files, size=size)
    if options.single_files:
        ours = set(map(image_file, finished))
        if stale := sorted(path.name for path in Path(not_none(options.out)).glob("*.png") if path.name not in ours):
            raise InputError(
                f"{len(stale)} PNGs of another run would stay there ({stale[0]}, …)",
                argument="out",
                value=options.out,
                remedy="empty it or name another folder",
            )


def check_room(options: ImagesOut, count: int, image_size: tuple[int, int]) -> None:
    """Raise :class:`InputError` if the npz has no room on its disk, or the grid none in memory."""
    size = count * math.prod(image_size) * 3
    if options.npz_file is not None:
        check_place(options.npz_file, "npz", size=size)
    memory = memory_of(torch.device("cpu"))
    if options.out is not None and not options.single_files and 2 * size > memory:  # the images, and the grid of them
        raise InputError(
            (f"a grid of {count} images takes over {in_bytes(2 * size)}, and the memory is {in_bytes(memory)}"),
            argument="out",
            value=options.out,
            remedy="give a folder for single files, or fewer",
        )
