"""What a command prints of what the library says: plain lines, on the main process alone."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout

from gspn_dit.storage.files import is_stdout


def is_first_process() -> bool:
    """Whether this is the first of a machine's processes."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def plain_messages() -> Iterator[None]:
    """In the block what this library says is plain lines, a warning is one, and other libraries say only errors."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")  # their errors are raised, too
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if logging.lastResort:  # what prints a record that nobody has asked for
        logging.lastResort.setLevel(logging.ERROR)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        from tqdm import tqdm

        tqdm.write(f"warning: {' '.join(str(message).split())}", file=sys.stderr)  # above a bar

    with warnings.catch_warnings(), _said_as_lines():
        if not sys.warnoptions:
            for kind in (DeprecationWarning, FutureWarning):  # of one library to another
                warnings.simplefilter("ignore", kind)
        warnings.showwarning = show
        yield


class _AsLines(logging.Handler):
    """Records of the library as a command prints them, on its main process alone.

    Info is a plain line on stdout, or on stderr where the record's `extra` is `{"stderr": True}`. A warning is a line
    `warning: …` on stderr.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        state = sys.modules.get("accelerate.state")  # not imported for this
        if state is not None and state.PartialState._shared_state:
            return state.PartialState().is_main_process
        return is_first_process()

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        line, is_warning = record.getMessage(), record.levelno >= logging.WARNING
        if is_warning:
            line = f"warning: {' '.join(line.split())}"
        beside = is_warning or getattr(record, "stderr", False)
        tqdm.write(line, file=sys.stderr if beside else sys.stdout)  # above a bar


@contextmanager
def _said_as_lines() -> Iterator[None]:
    """In the block, what the library's loggers say is printed; it is what a caller's own handlers get elsewhere."""
    logger = logging.getLogger("gspn_dit")
    if any(isinstance(handler, _AsLines) for handler in logger.handlers):  # of a command that runs another
        yield
        return
    handler, level, propagate = _AsLines(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def words_beside(out: object) -> AbstractContextManager[object]:
    """In the block, where a file goes to /dev/stdout, what is printed goes to stderr, and not into the file."""
    return redirect_stdout(sys.stderr) if isinstance(out, str) and is_stdout(out) else nullcontext()
