"""Cells of a benchmark that trains many networks: each finished once, by whichever process has it, stopped at will."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from gspn_dit.errors import InputError
from gspn_dit.storage.files import alone_in


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
