"""`gspn-dit ops`: the backends of `propagate` on this machine, and why if one is missing."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("ops", prog="python -m gspn_dit.ops")
    raise SystemExit

from typing import TYPE_CHECKING

from gspn_dit.errors import InputError
from gspn_dit.ops.registry import backends, find

if TYPE_CHECKING:
    from gspn_dit.commands import OpsOptions as Options


def main(options: Options) -> None:
    """Print one line per backend of the operator: whether it runs on this machine, and if not, why."""
    states = {b.name: b.status() for b in ([find(options.require, "require")] if options.require else backends())}
    for name, (available, detail) in states.items():
        print(f"{name:<12} {'available' if available else 'not available':<14} {detail}")
    if options.require and not states[options.require].available:
        raise InputError("not available here, see above", argument="require", value=options.require)
