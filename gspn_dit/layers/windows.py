"""Windows: scans that start anew at both axes' borders, where chunks cut only the axis that a scan runs along."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A chunk of both axes: what a layer scans in place of a chunk of lines.

    It is a square of the map, smaller at the map's edges where the grid of windows does not fit.

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
