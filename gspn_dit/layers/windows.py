"""Windows: scans that start anew at both axes' borders, where chunks cut only the axis that a scan runs along.

A window is a square of the map, smaller at the map's edges where the grid of windows does not fit. A neighbour outside
it takes no part, as outside the map. So windows are maps of their own, and a map's windows are the batch of one call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gspn_dit.errors import InputError, is_whole
from gspn_dit.ops import propagate


@dataclass(frozen=True)
class Window:
    """A chunk of both axes: what a layer scans in place of a chunk of lines.

    Attributes:
        side: Tokens along each axis.
        shifted: Whether the grid of windows starts half a window further down and to the right.
    """

    side: int
    shifted: bool = False

    @property
    def shift(self) -> int:
        """Row and column of the grid's first borders, 0 for those of the map."""
        return self.side // 2 if self.shifted else 0


@dataclass(frozen=True)
class Run:
    """Windows of one length that follow each other along an axis.

    Attributes:
        start: The first line of the first.
        length: Lines of each.
        count: How many.
    """

    start: int
    length: int
    count: int

    @property
    def stop(self) -> int:
        """The line after the last."""
        return self.start + self.length * self.count


def window_runs(lines: int, window: int, shift: int = 0) -> list[Run]:
    """The windows along an axis, at most three runs: a shorter first one, the whole ones, a shorter last one.

    Args:
        lines: Lines of the map along the axis. An axis of at most `window` lines is one window, whatever the shift.
        window: Lines of a whole window.
        shift: Line of the first border; 0 begins with a whole window.

    Raises:
        InputError: A window below 1, or a shift outside 0 … window - 1.
    """
    if not is_whole(window) or window < 1:
        raise InputError("give a number of lines from 1", argument="window", value=window)
    if not is_whole(shift) or not 0 <= shift < window:
        raise InputError(f"give a number of lines from 0, below window={window}", argument="shift", value=shift)
    if lines <= window:
        return [Run(0, lines, 1)]
    count, rest = divmod(lines - shift, window)
    runs = [Run(0, shift, 1), Run(shift, window, count), Run(lines - rest, rest, 1)]
    return [run for run in runs if run.length and run.count]


def cut(tensor: Tensor, rows: Run, columns: Run) -> Tensor:
    """The windows of (B, H, W, …) that both runs name, as a batch (B · rows.count · columns.count, …).

    A map that is one window comes back as it is.
    """
    part = tensor[:, rows.start : rows.stop, columns.start : columns.stop]
    if rows.count == columns.count == 1:
        return part
    windows = part.unflatten(2, (columns.count, columns.length)).unflatten(1, (rows.count, rows.length))
    return windows.transpose(2, 3).flatten(0, 2)


def join(windows: Tensor, rows: Run, columns: Run) -> Tensor:
    """What :func:`cut` made, as a map again: (B, rows.count · rows.length, columns.count · columns.length, …)."""
    if rows.count == columns.count == 1:
        return windows
    return windows.unflatten(0, (-1, rows.count, columns.count)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def propagate_windows(
    x: Tensor,
    *gates: Tensor,
    window: int | None,
    shift: int = 0,
    scan: Callable[..., Tensor] = propagate,
    **options: Any,
) -> Tensor:
    """:func:`gspn_dit.ops.propagate` in windows of `window` × `window` tokens.

    Windows of one size are one call; a grid that does not fit the map needs up to nine.

    Args:
        x: (B, H, W, C) values.
        gates: The other operands of a token, (B, H, W, …): gate logits, input gates and perhaps output gates.
        window: Side of a window; None scans the whole map.
        shift: Row and column of the first borders, as in :func:`window_runs`.
        scan: What is called with the windows, whole maps to it, and with the options.
        options: The operator's other arguments, but for `chunk`.

    Returns:
        y, (B, H, W, C).

    Raises:
        InputError: As :func:`window_runs` and the operator.
    """
    if window is None:
        return scan(x, *gates, **options)
    rows, columns = (window_runs(lines, window, shift) for lines in x.shape[1:3])
    bands = []
    for row in rows:
        parts = []
        for column in columns:
            operands = (cut(each, row, column) for each in (x, *gates))
            parts.append(join(scan(*operands, **options), row, column))
        bands.append(torch.cat(parts, 2))
    return torch.cat(bands, 1)
