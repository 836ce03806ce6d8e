"""Result files, Markdown and JSON: each names the code and the machine that its figures are of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.revision import revision
from gspn_dit.options import require
from gspn_dit.storage.files import replacing, write_json


def write_report(lines: Iterable[str], machine: str, out: str | Path | None) -> None:
    """Print a report of one run, with the machine and the revision in its last lines, and write it to a file.

    Args:
        lines: The report.
        machine: What :func:`benchmarks.machine.machine` says.
        out: The Markdown file; None for none.
    """
    text = "\n".join([*lines, "", *origin(machine)])
    print(text)
    if out is not None:
        write_text(out, text)


def write_text(out: str | Path, text: str) -> None:
    """Write a text whose last lines are an :func:`origin`."""
    with replacing(out) as temporary:
        temporary.write_text(text + "\n")


def origin(machine: str, rows: Iterable[Mapping[str, Any]] | None = None) -> list[str]:
    """The last lines of a report: the machine, and the revision of the code.

    Args:
        machine: What :func:`benchmarks.machine.machine` says.
        rows: Of a report that was made in several runs: its rows, each with its revision.
    """
    found = {row.get("revision", "not noted") for row in rows} if rows is not None else {revision()}
    return [machine, "", f"Code: {', '.join(sorted(found)) or revision()}."]


def noted(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the revision that it is measured at."""
    return {**row, "revision": revision()}


def write_rows(path: Path, settings: Mapping[str, Any], rows: Any) -> None:
    """Write rows, each :func:`noted`, under settings that name the machine."""
    write_json(path, {**settings, "rows": rows})


def saved_rows(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows in a results file, none if there is none. Raises :class:`InputError` if it is of other settings."""
    if not path.exists():
        return {}
    saved = json.loads(path.read_text())
    for key, value in settings.items():
        require(saved[key] == value, key, value, f"{saved[key]!r} as in {path}; or choose another --out")
    return saved["rows"]
