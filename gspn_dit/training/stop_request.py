"""A request to stop a training, by SIGTERM or Ctrl-C: the step is finished and a checkpoint written first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

CTRL_C = "Ctrl-C"  # what a terminal sends as SIGINT


class StoppedByCtrlC(KeyboardInterrupt):
    """Ctrl-C ended a training whose last step is saved and told of."""


class StopRequest:
    """Whether this process was asked to stop: in the block SIGTERM, or a first Ctrl-C while it trains, only sets `by`.

    A second Ctrl-C, or one before training, ends it at once.

    Attributes:
        by: What asked: `SIGTERM` or `Ctrl-C`; None while nothing has.
        training: Whether there are steps to save: to be set where they begin.
    """

    def __init__(self) -> None:
        self.by: str | None = None
        self.training = False
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether anything has asked."""
        return self.by is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's `command &` is deaf to Ctrl-C
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.by = self.by or "SIGTERM"

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.by == CTRL_C or not self.training:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # for a third, if a library's code does not let go
            raise KeyboardInterrupt
        self.by = CTRL_C
        if os.environ.get("RANK", "0") == "0":  # by no stream of Python's, in the middle of whose writing this may be
            end_of_bar = "\n" if os.isatty(2) else ""
            said = f"{end_of_bar}interrupted: finishing the step, saving; Ctrl-C again ends at once\n"
            os.write(2, said.encode())
