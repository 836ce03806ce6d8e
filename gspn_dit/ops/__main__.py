"""`python -m gspn_dit.ops`: the backends of `propagate` on this machine, and for one that is missing, why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gspn_dit.errors import InputError
from gspn_dit.ops.backends import BACKENDS, status
from gspn_dit.options import command


@dataclass
class Options:
    """Which backends to look for.

    Args:
        require: Look for this one alone, and end with an error if it is missing.
    """

    require: Literal["cpu", "cuda"] | None = None


def main(options: Options) -> None:
    """Print one line for each backend of the operator: whether it runs on this machine, and if not, why."""
    for name in [options.require] if options.require else BACKENDS:
        available, detail = status(name)
        print(f"{name:<10} {'available' if available else 'not available':<14} {detail}")
    if options.require and not status(options.require).available:
        raise InputError(f"require={options.require!r}: not available here, see above")


if __name__ == "__main__":
    command(main, Options, prog="python -m gspn_dit.ops")
