"""What the processes of one training do together: fail as one, stop as one, and keep others out of their run.

They have met before: accelerate's PartialState is there.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from gspn_dit.errors import InputError

T = TypeVar("T")


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
    """Whether this process was asked to stop: in the block, SIGTERM sets `requested` and does nothing else."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._main_thread = threading.current_thread() is threading.main_thread()
        if self._main_thread:  # Python allows handlers nowhere else
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main_thread:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def claimed(run: str | os.PathLike) -> Iterator[None]:
    """In the block, the run's folder is this process's to write: its `.lock` goes with the process, however it ends.

    Raises:
        InputError: If another process has it, or it cannot be written to.
    """
    path = Path(run) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(f"output_dir={str(run)!r}: cannot be written to ({error.strerror}); name another") from error
    with file:
        try:
            # A POSIX lock: it works over NFS, and a process's children do not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"output_dir={str(run)!r}: {holder} is training in it; wait for it, or name another folder"
            ) from None
        except OSError as error:
            warnings.warn(f"{path}: this file system has no locks ({error}); start one run at a time", stacklevel=3)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def heed_only_the_parent(_: int = 0) -> None:
    """A data worker's start: a scheduler's SIGTERM reaches it too, and the last step still needs its data.

    It must go on heeding the training process, which ends its workers by SIGTERM and then waits for them.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _result_or_problem(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except InputError as error:
        return None, str(error)


def _raise_first(problems: list[str | None]) -> None:
    if first := next(filter(None, problems), None):
        raise EveryonesError(first)
