"""Markdown tables, as every benchmark writes them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def row(cells: Iterable[object]) -> str:
    """One row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(names: Sequence[str]) -> list[str]:
    """The first row of a table and the rule under it."""
    return [row(names), "|---" * len(names) + "|"]


def figure(measured: dict[str, Any] | None, what: str, scale: float) -> str:
    """A measured figure times a scale, to three digits or the unit.

    Args:
        measured: The figures by name; what there is instead is its `error`; None is –. `whole=False` marks with ~ what
            is put together from parts.
        what: The name.
        scale: From the figure's unit to the table's.
    """
    if measured is None:
        return "–"
    if what not in measured:
        return measured["error"]
    value = measured[what] * scale
    return ("" if measured.get("whole", True) else "~") + (f"{value:.0f}" if value >= 100 else f"{value:.3g}")


def ratio(other: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    """How many times as fast ours is as the other, by their `seconds`; ~ as in :func:`figure`."""
    if not (other and ours and "seconds" in other and "seconds" in ours):
        return "–"
    both_whole = other.get("whole", True) and ours.get("whole", True)
    return f"{'' if both_whole else '~'}{other['seconds'] / ours['seconds']:.2f}×"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; of one value, the value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
