"""The one exception for input that a person can mend, and what a machine could not give, in words."""

from __future__ import annotations

import copy
import errno
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TypeGuard, TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Bad input, as data: which argument, the value that came, what is wrong, what is wanted, and the remedy.

    `str(error)` renders it in one line, `argument=value: problem; wanted …; remedy`, of what there is. Commands print
    that line and exit with status 2; in a library call it is an ordinary ValueError.

    Args:
        problem: What is wrong, where `wanted` does not say it.
        argument: The name of the argument or option.
        value: The value that came; left out where it says nothing.
        wanted: What the argument takes.
        remedy: What to do about it.
    """

    def __init__(
        self,
        problem: str | None = None,
        *,
        argument: str | None = None,
        value: object = ...,
        wanted: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem, self.argument, self.value, self.wanted, self.remedy = problem, argument, value, wanted, remedy

    def __str__(self) -> str:
        parts = [self.problem, f"wanted {self.wanted}" if self.wanted else None, self.remedy]
        said = "; ".join(part for part in parts if part)
        if self.argument is None:
            return said
        return f"{self.argument}{'' if self.value is ... else f'={shorten(self.value)}'}: {said}"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problem,), self.__dict__

    def about(self, argument: str) -> InputError:
        """The same error about an argument of another name: the option that the value came from."""
        renamed = copy.copy(self)
        renamed.argument = argument
        return renamed


class Stopped(Exception):
    """Work ended before it was done: a command prints the message as one line and exits with `status`."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def renamed(prefix: str = "", **names: str) -> Iterator[None]:
    """In the block, an error about an argument names the option it came from: `renamed(source="data.source")`.

    Arguments without a name here get the prefix, if there is one.
    """
    try:
        yield
    except InputError as error:
        argument = error.argument or ""
        if argument not in names and not (prefix and argument.isidentifier()):
            raise
        raise error.about(names.get(argument, prefix + argument)) from error


def shorten(value: object) -> str:
    """A value as it fits into one line: text and a path whole, anything else cut at 80 characters."""
    if isinstance(value, str | os.PathLike):
        return repr(os.fspath(value))
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number, and neither infinite nor nan."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def not_none(value: T | None) -> T:
    """A value that is known to be there, though its type lets it be None. Raises TypeError if it is None."""
    if value is None:
        raise TypeError("a value that must be there is None")
    return value


_REMEDIES = {
    "make room there": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "see to its permissions": (errno.EACCES, errno.EPERM),
    "name another place": (errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
    "see to that disk": (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV),
    "raise the limit of open files (`ulimit -n`)": (errno.EMFILE, errno.ENFILE),
}


def machine_fault(error: BaseException, place: str | None = None) -> str | None:
    """What the machine could not give, and the remedy, in one line: memory, room or rights on a disk.

    None if that is not what is wrong: then it is a fault of the program, or of something that it has no name for.

    Args:
        error: What was raised.
        place: Where the work was to be written, for errors that do not say.
    """
    said = " ".join(str(error).split())
    torchs = isinstance(error, RuntimeError) and re.search("out of memory|DefaultCPUAllocator", said)
    if torchs or isinstance(error, MemoryError):
        asked = re.search(r"allocate ([0-9][0-9.]* ?[A-Za-z]+)", said)
        more = f" (for {asked[1]} more)" if asked else ""
        return f"not enough memory{more}; fewer images at a time or smaller ones need less"
    number, path = None, place
    if isinstance(error, OSError):
        number, path = error.errno, error.filename or place
        if number == errno.ENOENT and error.filename and not os.path.isdir(os.path.dirname(error.filename) or "."):
            return f"{path}: there is no such folder; make it, or name another place"
    elif type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error ([0-9]+)\)", said)):
        number = int(found[1])
    remedy = next((remedy for remedy, numbers in _REMEDIES.items() if number in numbers), None)
    if remedy is None or number is None:
        return None
    return f"{f'{path}: ' if path else ''}{os.strerror(number)}; {remedy}"


def is_of_files(error: Exception) -> bool:
    """Whether what a library raised on loading a model says that files are missing, damaged or do not fit each other.

    Anything else is a fault of a program, of a device or of versions, and not to be taken for the files'.
    """
    if machine_fault(error) is not None:
        return False
    if isinstance(error, OSError | ValueError) or type(error).__name__ == "SafetensorError":
        return True
    if type(error) is Exception:  # as tokenizers raises it, of files that it cannot parse
        return True
    return isinstance(error, RuntimeError) and re.search("size mismatch|mismatched_sizes", str(error)) is not None


def warn(message: str) -> None:
    """Warn, which a command prints as one line; of a machine's processes the first alone does.

    Warnings are Python's and not `logging`'s: a caller sees them without configuring anything, and can filter them or
    turn them into errors.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(message, stacklevel=3)
