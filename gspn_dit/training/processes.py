"""What the processes of one training do together: fail as one, stop as one, and keep others out of their run.

They have met before: accelerate's PartialState is there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from gspn_dit.errors import InputError
from gspn_dit.storage.files import alone_in

T = TypeVar("T")
CTRL_C = "Ctrl-C"  # what a terminal sends as SIGINT


class StoppedByCtrlC(KeyboardInterrupt):
    """Ctrl-C ended a training whose last step is saved and told of."""


class EveryonesError(InputError):
    """An :class:`InputError` that all processes raise alike: one of them prints it."""


def together(work: Callable[[], T]) -> T:
    """Do it on every process; an :class:`InputError` of one is everyone's, so that none waits for one that left."""
    result, problem = _result_or_problem(work)
    _raise_first(gather_object([problem]))
    return result


def on_main(work: Callable[[], T], is_main: bool) -> T:
    """Do it on the main process alone; its result, or its :class:`InputError`, is everyone's."""
    result, problem = broadcast_object_list(list(_result_or_problem(work) if is_main else (None, None)))
    _raise_first([problem])
    return result


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


@contextmanager
def claimed(run: str | os.PathLike) -> Iterator[None]:
    """In the block, the run's folder is this process's to write; a `.lock` in it says so. A new one goes if empty.

    Raises:
        InputError: If another process has it, or it cannot be written to.
    """

    def refuse(holder: str) -> None:
        raise InputError(f"output_dir={str(run)!r}: {holder} is training in it; wait for it, or name another folder")

    with ExitStack() as leaving:
        try:
            leaving.enter_context(alone_in(Path(run), refuse))
        except OSError as error:
            why = f"cannot be written to ({error.strerror})"
            raise InputError(f"output_dir={str(run)!r}: {why}; name another") from error
        yield


def _result_or_problem(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except InputError as error:
        return None, str(error)


def _raise_first(problems: list[str | None]) -> None:
    if first := next(filter(None, problems), None):
        raise EveryonesError(first)
