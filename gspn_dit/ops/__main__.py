"""`python -m gspn_dit.ops`: the backends of `propagate` on this machine, and for one that is missing, why."""

from __future__ import annotations

from gspn_dit.commands import OpsOptions as Options
from gspn_dit.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("ops", prog="python -m gspn_dit.ops"))

from gspn_dit.errors import InputError
from gspn_dit.ops.backends import BACKENDS, status


def main(options: Options) -> None:
    """Print one line for each backend of the operator: whether it runs on this machine, and if not, why."""
    for name in [options.require] if options.require else BACKENDS:
        available, detail = status(name)
        print(f"{name:<10} {'available' if available else 'not available':<14} {detail}")
    if options.require and not status(options.require).available:
        raise InputError(f"require={options.require!r}: not available here, see above")
