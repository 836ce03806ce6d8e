"""A file of prompts, as every command reads one."""

from __future__ import annotations

from pathlib import Path

from gspn_dit.errors import InputError


def prompt_lines(path: str) -> list[str]:
    """The prompts of a text file, one a line; lines that are blank or begin with # are no prompts.

    Raises :class:`InputError` if it cannot be read, or has none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", argument="prompts", value=path) from error
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text ({error})", argument="prompts", value=path) from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise InputError("has no prompts", argument="prompts", value=path, wanted="one a line")
    return prompts
