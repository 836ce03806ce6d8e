"""When a benchmark that was given some time has to stop."""

from __future__ import annotations

import math
import time

GO_ON = "no time left; run the same command again to go on"  # gpu.sh looks for it


class Deadline:
    """A number of seconds from now, or never.

    Args:
        seconds: None for never.
    """

    def __init__(self, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until then, below 0 after it."""
        return self.end - time.monotonic()

    def passed(self) -> bool:
        """Whether the time is up."""
        return self.left <= 0
