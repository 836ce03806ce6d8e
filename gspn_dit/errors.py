"""The one exception for input that a person can mend."""

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
