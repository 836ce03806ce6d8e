"""What a benchmark that goes on where it stopped has measured before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspn_dit.options import require


def saved_rows(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows in a results file, none if there is none. Raises :class:`InputError` if it is of other settings."""
    if not path.exists():
        return {}
    saved = json.loads(path.read_text())
    for key, value in settings.items():
        require(saved[key] == value, key, value, f"{saved[key]!r} as in {path}; or choose another --out")
    return saved["rows"]
