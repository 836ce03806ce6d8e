"""How far long work is: a bar on a terminal; in a log, where a bar is one endless line, plain lines now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from tqdm import tqdm

from gspn_dit.errors import not_none

SECONDS = 30  # from one line of a log to the next


def progress(
    iterable: Iterable | None = None, *, by_hand: bool = False, leave: bool | None = None, **options: Any
) -> Bar | Lines:
    """What shows how far long work is, on stderr; used as tqdm is, over an iterable or with `update`.

    Args:
        iterable: What to go through, if anything.
        by_hand: A log gets a line where `line()` is called and nowhere else; other work a line every half a minute
            and one at its end. Work inside other work gets none.
        leave: Whether a bar stays after its end, and a log gets a line of it; None where it is not inside another.
        options: tqdm's `total`, `desc`, `unit`, `initial`, `disable`, `smoothing`.
    """
    if sys.stderr.isatty():
        return Bar(iterable, leave=leave, **options)
    return Lines(iterable, by_hand=by_hand, leave=leave is not False, **options)


class Bar(tqdm):
    """tqdm's bar. One that an error ends goes: the error is what is to be read."""

    def line(self) -> None:
        """Nothing: a bar shows what it has."""

    def __iter__(self) -> Iterator:
        yield from _through(self)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self.leave = False
        super().__exit__(kind, *rest)


class Lines:
    """What a log gets in a bar's place; it is used as a bar is."""

    depth = 0  # of the work that is shown now, inside other work

    def __init__(
        self,
        iterable: Iterable | None,
        *,
        by_hand: bool,
        leave: bool,
        desc: str,
        unit: str,
        total: int | None = None,
        initial: int = 0,
        disable: bool = False,
        smoothing: float | None = None,
    ) -> None:
        self.iterable, self.by_hand, self.leave, self.desc, self.unit = iterable, by_hand, leave, desc, unit
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.n = self.initial = initial
        self.postfix = ""
        self.began = self.said = time.monotonic()
        self.shown = not disable and Lines.depth == 0
        Lines.depth += not disable
        self.open = not disable

    def update(self, n: int = 1) -> None:
        """As much more is done."""
        self.n += n
        if not self.by_hand and self.n != self.total and time.monotonic() - self.said >= SECONDS:
            self.line()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What the next lines say beside how far it is."""
        self.postfix = text

    def line(self) -> None:
        """Say how far it is, how fast, and how long what is left will take."""
        self.said = time.monotonic()
        if not self.shown:
            return
        seconds, done = self.said - self.began, self.n - self.initial
        left = 0 if self.total is None else self.total - self.n
        going_on = left > 0
        far = f"{self.n:,} of {self.total:,}" if going_on else f"{self.n:,}"
        units = self.unit if (self.total if going_on else self.n) == 1 else f"{self.unit}s"
        now = f", {done:,} of them" if self.initial else ""
        parts = [f"{self.desc}: {far} {units}{now} in {tqdm.format_interval(seconds)}"]
        if self.postfix:
            parts.append(self.postfix)
        elif done and seconds:
            parts.append(f"{figure(done / seconds)} {self.unit}s/s")
        if done and going_on:
            parts.append(f"{tqdm.format_interval(seconds / done * left)} left")
        print(", ".join(parts), file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """Print a line of something else, on stdout as tqdm does."""
        print(text)

    def close(self) -> None:
        """The end of the work."""
        Lines.depth -= self.open
        self.open = False

    def __iter__(self) -> Iterator:
        yield from _through(self)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None and self.leave and not self.by_hand and self.n > self.initial:
            self.line()
        self.close()


def _through(shown: Bar | Lines) -> Iterator:
    with shown:
        for item in not_none(shown.iterable):
            yield item
            shown.update()


def figure(value: float) -> str:
    """A number as a person reads it: four digits or, up to a million, all before the point; else an exponent."""
    return f"{value:,.0f}" if 1e4 <= value < 1e6 else f"{value:#.4g}".removesuffix(".")
