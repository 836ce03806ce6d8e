"""Which revision of the code a figure is of."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "GSPN_DIT_REVISION"
MEASURED = ("gspn_dit", "csrc", "benchmarks", "setup.py", ":(exclude)benchmarks/results")  # what a figure depends on


@cache
def revision() -> str:
    """The short hash of this checkout's commit, "with changes" if code that is measured differs from it.

    Without git, as in an installed package or a copy of the files, it is what the environment variable
    GSPN_DIT_REVISION says, else the package's version and that it is of no git checkout.
    """
    if _git("rev-parse", "--show-toplevel") == str(ROOT):
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", *MEASURED)
        if commit and changed is not None:
            return f"{commit} with changes" if changed else commit
    if given := os.environ.get(VARIABLE):
        return given
    try:
        return f"gspn-dit {version('gspn-dit')}, no git checkout"
    except PackageNotFoundError:
        return "unknown, no git checkout"


def is_commit(revision: str) -> bool:
    """Whether it names a commit without changes, so that figures of it are of the same code another time."""
    return not revision.endswith(("with changes", "no git checkout"))


def _git(*arguments: str) -> str | None:
    """What git says of this checkout; None if there is no git or it has nothing to say."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
