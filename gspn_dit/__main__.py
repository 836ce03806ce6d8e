"""The command `gspn-dit`, or `python -m gspn_dit`: all others by their names."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from gspn_dit.commands import GROUPS, VERBS, run
from gspn_dit.errors import InputError
from gspn_dit.options import fail


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names with the options after it; without one, list them."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: gspn-dit COMMAND [--option value …]; gspn-dit COMMAND --help explains its options")
        for group, verbs in GROUPS.items():
            print(f"\n{group}:")
            for each, verb in verbs.items():
                print(f"  {each:<12} {verb.help}")
    elif name in VERBS:
        run(name, argv=words)
    elif name.startswith("-"):
        fail(InputError("the command comes first", argument=name, wanted=f"one of {', '.join(VERBS)}"), "gspn-dit")
    else:
        close = difflib.get_close_matches(name.replace("_", "-"), VERBS, n=1, cutoff=0.4)
        remedy = f"did you mean {close[0]}?" if close else f"wanted one of {', '.join(VERBS)}"
        fail(InputError(f"{name!r}: no such command", remedy=remedy), "gspn-dit")


if __name__ == "__main__":
    main()
