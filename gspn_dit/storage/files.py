"""Files that are whole or not there, and folders that are continued only as they were begun."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from gspn_dit.errors import InputError, shorten, warn

if TYPE_CHECKING:
    from torch import Tensor

LOCK_FILE = ".lock"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write a file to; it becomes `path` if the block ends well, and else goes.

    It is beside `path` and no other process's, so any number of them may write the same file, and the last one's is
    there in the end. A link stays, and the file it leads to is replaced. What is no regular file (a device, a pipe,
    /dev/stdout) is written into. An OSError of it names `path`.
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder, _naming(path, folder):
            temporary = Path(folder) / Path(path).name
            yield temporary
            with open(temporary, "rb") as source, _open_stream(path) as target:
                shutil.copyfileobj(source, target)
        return
    real = Path(os.path.realpath(path))
    temporary = real.with_name(f".{real.name}.{os.getpid()}@{socket.gethostname()}.tmp")
    with _naming(path, temporary):
        try:
            yield temporary
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())  # the rename must not reach the disk before the data
            temporary.replace(real)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: str | os.PathLike, temporary: str | os.PathLike) -> Iterator[None]:
    """In the block, an OSError about a temporary path, or about none, becomes one about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and str(error.filename or temporary).startswith(str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise


def is_stream(path: str | os.PathLike) -> bool:
    """Whether a path leads to what is neither a file nor a folder, or is an open file of this process's."""
    return _descriptor(path) is not None or (os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)))


def is_stdout(path: str | os.PathLike) -> bool:
    """Whether a path is what this process prints to."""
    return _descriptor(path) == 1


def _descriptor(path: str | os.PathLike) -> int | None:
    """The number of the open file that /dev/stdout, /dev/stderr or /dev/fd/<number> is."""
    named = re.fullmatch(r"/dev/(?:fd/([0-9]+)|(stdout)|(stderr))", os.path.abspath(path))
    return named and (1 if named[2] else 2 if named[3] else int(named[1]))


def _open_stream(path: str | os.PathLike) -> IO[bytes]:
    descriptor = _descriptor(path)
    if descriptor is None:
        return open(path, "wb")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return open(os.dup(descriptor), "wb")  # at its place, where opening the path would begin the file anew


def check_place(path: str | os.PathLike, option: str = "out", *, folder: bool = False, size: int = 0) -> None:
    """Look, before long work, whether a file or folder can be written, and clear what killed writers of it left.

    Args:
        path: The file or the folder; folders above it may be missing.
        option: What names it, for the error.
        folder: Whether it is a folder.
        size: Bytes that are to be written, at the least.

    Raises :class:`InputError`: no folder there, or one that cannot be written to, a link to nowhere, too little room.
    """
    if not folder and is_stream(path):
        return
    real, another = Path(os.path.realpath(path)), "choose another path"
    if os.path.lexists(real) and real.is_dir() != folder:
        found, wanted = ("file", "a folder") if folder else ("folder", "a file name")
        raise InputError(f"is a {found}", argument=option, value=path, wanted=wanted)
    if os.path.islink(path) and not real.parent.is_dir():
        raise InputError(
            f"is a link into {str(real.parent)!r}, which is not there", argument=option, value=path, remedy=another
        )
    there = next(place for place in (real if folder else real.parent, *real.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{str(there)!r} is no folder that can be written to", argument=option, value=path, remedy=another
        )
    if (free := shutil.disk_usage(there).free) < max(size, 1):
        raise InputError(
            f"at least {in_bytes(size)} are to be written, and {str(there)!r} has room for {in_bytes(free)}",
            argument=option,
            value=path,
            remedy=f"make room, or {another}",
        )
    remove_leftovers(real.parent, f".{glob.escape(real.name)}")
    remove_leftovers(real)


def remove_leftovers(folder: Path, start: str = ".") -> None:
    """Remove the temporary files in a folder that killed processes of this machine left there."""
    for leftover in folder.glob(f"{start}*@{glob.escape(socket.gethostname())}.tmp"):
        pid = leftover.name.rpartition("@")[0].rpartition(".")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            leftover.unlink(missing_ok=True)
        except (OSError, ValueError, OverflowError):  # another user's process; a name that is not ours
            pass


def in_bytes(size: int) -> str:
    """A number of bytes for the eye."""
    power = min(int(math.log10(max(size, 1))) // 3, 5)
    return f"{size / 1000**power:.{min(power, 1)}f} {('bytes', 'KB', 'MB', 'GB', 'TB', 'PB')[power]}"


@contextmanager
def alone_in(folder: Path, wait: Callable[[str], None]) -> Iterator[None]:
    """In the block, a folder is this process's: `wait` is told who has it, and then it is waited for, unless it raises.

    The folder is made if there is none; it and those above it that were made go again if they are empty afterwards. The
    lock goes with the process, however that ends, and its file with the block.
    """
    new = [each for each in (folder, *folder.parents) if not each.exists()]

    def tell(holder: str) -> None:
        wait(holder)
        new[:] = new or [folder]  # the holder has made it, for all that is known

    with ExitStack() as leaving:
        leaving.callback(_remove_empty, new)
        lock = leaving.enter_context(_locked(folder / LOCK_FILE, tell))
        leaving.callback((folder / LOCK_FILE).unlink, missing_ok=True)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # one that is not empty, and those above it
        for folder in folders:
            folder.rmdir()


def _locked(path: Path, wait: Callable[[str], None]) -> IO[str]:
    """A lock file, open and locked, in a folder that is made. Its process's end sets it free, however that comes."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a+")  # noqa: SIM115 (the lock is as long as it is open)
        except FileNotFoundError:  # whoever was alone in the folder has removed it
            continue
        try:
            # A POSIX lock: it works over NFS, and a process's children do not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            try:
                wait(file.read().strip() or "another process")
            except InputError:
                file.close()
                raise
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            warn(f"{path}: this file system has no locks ({error}); start one at a time")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # else whoever had it has removed it
                return file
        file.close()


def save_tensors(tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read like any other file; safetensors' own is its owner's alone."""
    from safetensors.torch import save_file  # and torch: a configuration is written and read without

    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_new(folder: Path, size: int = 0) -> None:
    """Raise :class:`InputError` if the folder that a command's `out` names is there, or cannot be made of that size."""
    if folder.exists():
        raise InputError("exists already", argument="out", value=str(folder), remedy="remove it or name another folder")
    check_place(folder, folder=True, size=size)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary path to make a folder at; it becomes `folder` if the block ends well, and else goes.

    An OSError of it names `folder`. Raises :class:`InputError` if there is one already.
    """
    require_new(folder)
    real = Path(os.path.realpath(folder))  # of a link that leads to where nothing is yet
    real.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=real.parent, prefix=f".{real.name}.") as temporary, _naming(folder, temporary):
        yield Path(temporary) / real.name
        (Path(temporary) / real.name).rename(real)


def write_json(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """Write a JSON file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def begin_or_continue(
    path: Path,
    settings: dict[str, Any],
    option: str,
    ignored: tuple[str, ...] = (),
    absent: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write what a folder's contents are made with into it, or check that they were begun with the same.

    Args:
        path: The JSON file in that folder.
        settings: What JSON can hold.
        option: The command's option that names the folder, for the error.
        ignored: Keys that may differ.
        absent: What a key that is not there, or null, stands for: nobody was asked when the folder was begun.

    Raises :class:`InputError`, naming the first key that differs, with both values.
    """
    if path.exists():
        check_begun(path, settings, option, ignored, absent)
    else:
        write_json(path, settings)


def check_begun(
    path: Path,
    settings: dict[str, Any],
    option: str,
    ignored: tuple[str, ...] = (),
    absent: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Raise :class:`InputError` if there is such a file and it is of other settings; as :func:`begin_or_continue`."""
    if not path.exists():
        return
    try:
        begun = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error})", remedy=f"restore it, or choose another --{option}") from error
    for key, value in json.loads(json.dumps(settings)).items():
        before = absent.get(key) if begun.get(key) is None else begun[key]
        if key not in ignored and before != value:
            raise InputError(
                f"{path.parent} was begun with {key}={shorten(before)}",
                argument=key,
                value=value,
                remedy=f"run with the same, or choose another --{option}",
            )
