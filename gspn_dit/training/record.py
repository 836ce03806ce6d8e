"""A run's record: metrics.csv and evaluation.csv, the curve drawn from the first, and warnings of what it lacks."""

from __future__ import annotations

import csv
import errno
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TypeVar

import numpy as np

from gspn_dit.errors import warn
from gspn_dit.storage.files import replacing
from gspn_dit.storage.run_folder import RunFolder

FEW = 20  # points of a curve that are marked each
COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "images_per_second")

T = TypeVar("T")


class Record:
    """A table of a run that grows by a line now and then.

    Args:
        path: The CSV file.
        step: Lines after this step, left by a run that was cut, are dropped.
        columns: Its columns; `step` is the first. A file of others is kept aside, as evaluation-1.csv and so on.
    """

    def __init__(self, path: Path, step: int, columns: Sequence[str] = COLUMNS) -> None:
        self.path, self.columns = path, columns
        if path.is_file() and path.read_text().splitlines()[:1] not in ([], [",".join(columns)]):
            names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in count(1))
            path.rename(next(name for name in names if not name.exists()))
        kept = [row for row in read_metrics(self.path, columns) if row["step"] <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        with replacing(self.path) as temporary:
            temporary.write_text(text.getvalue())

    def append(self, row: dict[str, float]) -> None:
        """Add a line; it is on its way to the disk when this returns. An OSError leaves the file as it was."""
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerow(row)
        line = text.getvalue().encode()
        with open(self.path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(before)
                raise

    def draw(self) -> None:
        """Draw the loss against the step as loss.png, once there is any; a failure is warned of."""
        run = RunFolder(self.path.parent)
        if rows := read_metrics(self.path):
            what = f"{run.loss_picture.name} is without step {rows[-1]['step']}"
            note(what, draw_loss, rows, run.path.name, run.loss_picture)


@contextmanager
def redrawn_at_an_error(record: Record | None) -> Iterator[None]:
    """In the block, an error has the curve of what there was drawn before it goes on."""
    try:
        yield
    except Exception:
        if record:
            record.draw()
        raise


def read_metrics(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, float]]:
    """The lines of such a file, without a last one that was cut short; none if there is no such file."""
    if not path.is_file():
        return []
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            try:
                values = {name: float(row[name]) for name in columns}
            except (KeyError, TypeError, ValueError):
                continue
            rows.append(values | {"step": int(values["step"])})
    return rows


def draw_loss(rows: list[dict[str, float]], name: str, path: Path) -> None:
    """Draw the loss of a run of that name: the logged means, one or more, and their running average on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.13, 0.11, 0.84, 0.85))  # a layout that fits itself takes as long as the drawing
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    marks = {"marker": "o", "markersize": 5} if len(rows) <= FEW else {}
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1)
    axes.plot(steps, running_mean(losses), color="C0", linewidth=2, label=name, **marks)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    if len(rows) == 1:
        axes.set(xlim=(steps[0] - 1, steps[0] + 1), ylim=(losses[0] / 2, losses[0] * 2))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_yticks(ticks := log_ticks(*axes.get_ylim()), [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, for the ticks of a logarithmic axis: 0.1, 0.2, 0.5, 1, …; about four to ten."""
    from matplotlib.ticker import MaxNLocator

    decades = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * decade for decade in decades for digit in digits if low <= digit * decade <= high]
        if len(ticks) < 4:
            break
        if len(ticks) <= 10:
            return ticks
    else:
        return ticks[:: math.ceil(len(ticks) / 10)]
    return [tick for tick in MaxNLocator(10, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]


def note(what: str, work: Callable[..., object], *arguments: object) -> bool:
    """Do what a run can go on without; if it fails, warn of `what` it has not. Whether it went well."""
    if problem := attempt(work, *arguments)[1]:
        warn(f"{what} ({problem}); training goes on")
    return problem is None


def attempt(work: Callable[..., T], *arguments: object) -> tuple[T | None, str | None]:
    """The result of some work, or what went wrong."""
    try:
        return work(*arguments), None
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Each value averaged with those before it, over a tenth of the curve."""
    sums = np.cumsum([0.0, *values])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - max(1, len(values) // 10), 0)
    return (sums[last] - sums[first]) / (last - first)
