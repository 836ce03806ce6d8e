"""Cells of a benchmark that trains many networks: each finished once, by whichever process has it, stopped at will."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from benchmarks.deadline import GO_ON
from gspn_dit.errors import InputError
from gspn_dit.storage.files import alone_in

Results = dict[str, list[dict[str, Any]]]  # by mixer, a result a seed
WINDOWS = 30  # of a drawn curve of losses


class Cell(Protocol):
    """One network to train and judge."""

    @property
    def folder(self) -> Path:
        """Where its run and its result are."""

    @property
    def result(self) -> Path:
        """The file that is there once it is judged."""

    def finish(self) -> bool:
        """Train from wherever it was left and judge; False if it was asked to stop before."""


def finish_all(cells: Sequence[Cell]) -> None:
    """Finish every cell that no other process has, until one is asked to stop."""
    for cell in cells:
        with claimed(cell) as mine:
            if mine and not cell.result.exists() and not cell.finish():
                break


@contextmanager
def claimed(cell: Cell) -> Iterator[bool]:
    """In the block, whether a cell is this process's and no other's."""

    def refuse(holder: str) -> None:
        raise InputError(f"{holder} has it", argument="out", value=cell.folder)

    with ExitStack() as leaving:
        try:
            leaving.enter_context(alone_in(cell.folder, refuse))
            mine = True
        except InputError:
            mine = False
        yield mine


def say_how_far(cells: Sequence[Cell], out: Path) -> None:
    """Print whether all cells are finished, and where the report is."""
    done = all(cell.result.exists() for cell in cells)
    print(f"{'all is done' if done else GO_ON}; report: {out / 'report.md'}")


def read_results(out: Path, mixers: Sequence[str]) -> Results:
    """The finished results by mixer, those of no seed left out."""
    found = {
        mixer: [json.loads(path.read_text()) for path in sorted((out / mixer).glob("seed-*/result.json"))]
        for mixer in mixers
    }
    return {mixer: results for mixer, results in found.items() if results}


def smoothed(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], list[float]]:
    """Steps and losses to draw: the mean of several curves of (step, loss), over a thirtieth of them at a time."""
    steps = [step for step, _ in curves[0]]
    losses = [statistics.mean(loss for _, loss in at) for at in zip(*curves, strict=True)]
    window = max(1, len(losses) // WINDOWS)
    ends = range(window, len(losses) + 1, window)
    return [steps[end - 1] for end in ends], [statistics.mean(losses[end - window : end]) for end in ends]
