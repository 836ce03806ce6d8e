"""The one exception for input that a person can mend, and warnings in one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: the message names the argument, the value that came, and what to do about it.

    Commands print it as one line and exit with status 2; in a library call it is an ordinary ValueError.
    """


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """In the block, an error about an argument names the option it came from: `renamed(source="data.source")`."""
    try:
        yield
    except InputError as error:
        argument, equals, rest = str(error).partition("=")
        if not equals or argument not in names:
            raise
        raise InputError(f"{names[argument]}={rest}") from error


def warn(message: str) -> None:
    """Print a warning as one line; of a machine's processes the first alone does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)
