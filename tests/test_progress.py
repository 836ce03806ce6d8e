"""What long work shows of itself: a bar on a terminal, plain lines in a log."""

import os
import pty
import re
import sys
import termios

import pytest

from gspn_dit import progress as module
from gspn_dit.progress import figure, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    time = type("Clock", (), {"now": 0.0, "monotonic": lambda self: self.now})()
    monkeypatch.setattr(module, "time", time)
    return time


def work(clock, items, seconds, **options):
    for _ in progress(range(items), desc="encode", unit="image", **options):
        clock.now += seconds


def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end(clock, capsys):
    work(clock, 1300, 0.125)
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    assert err.splitlines() == [
        "encode: 240 of 1,300 images in 00:30, 8.000 images/s, 02:12 left",
        "encode: 480 of 1,300 images in 01:00, 8.000 images/s, 01:42 left",
        "encode: 720 of 1,300 images in 01:30, 8.000 images/s, 01:12 left",
        "encode: 960 of 1,300 images in 02:00, 8.000 images/s, 00:42 left",
        "encode: 1,200 of 1,300 images in 02:30, 8.000 images/s, 00:12 left",
        "encode: 1,300 images in 02:42, 8.000 images/s",
    ]


def test_short_work_is_a_line_and_none_if_it_passes_or_shows_nothing(clock, capsys):
    work(clock, 5, 2)
    assert capsys.readouterr().err == "encode: 5 images in 00:10, 0.5000 images/s\n"
    work(clock, 1, 2)
    assert capsys.readouterr().err == "encode: 1 image in 00:02, 0.5000 images/s\n"
    work(clock, 5, 2, leave=False)
    work(clock, 5, 100, disable=True)
    work(clock, 0, 1)
    assert capsys.readouterr().err == ""


def test_work_inside_other_work_has_no_lines(clock, capsys):
    with progress(total=2, desc="evaluation", unit="set") as outer:
        for _ in range(2):
            work(clock, 100, 1)
            outer.update()
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["evaluation"] * 2
    work(clock, 1, 1)  # and afterwards it has again
    assert "encode" in capsys.readouterr().err


def test_lines_by_hand_come_when_they_are_asked_for(clock, capsys):
    with progress(total=400, initial=100, desc="run", unit="step", by_hand=True) as bar:
        for step in range(101, 401):
            clock.now += 1
            bar.update()
            bar.set_postfix_str(f"loss {figure(1 / step)}", refresh=False)
            if step % 150 == 0:
                bar.line()
    assert capsys.readouterr().err.splitlines() == [
        "run: 150 of 400 steps, 50 of them in 00:50, loss 0.006667, 04:10 left",
        "run: 300 of 400 steps, 200 of them in 03:20, loss 0.003333, 01:40 left",
    ]


def failing():
    for _ in progress(range(3), desc="encode", unit="image"):
        raise OSError("disk full")


def test_what_an_error_ends_has_no_last_line(capsys):
    with pytest.raises(OSError, match="full"):
        failing()
    assert capsys.readouterr().err == "" and module.Lines.depth == 0


def on_a_terminal(monkeypatch, work):
    """What the work writes to a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        work()
        monkeypatch.undo()
        terminal.flush()
        written = os.read(ours, 1 << 16).decode()
    os.close(ours)
    return written


def test_a_terminal_gets_a_bar_that_an_error_takes_away(monkeypatch):
    def failed():
        with pytest.raises(OSError, match="full"):
            failing()

    bar = on_a_terminal(monkeypatch, lambda: list(progress(range(3), desc="encode", unit="image")))
    assert re.search(r"\rencode: 100%\|█+\| 3/3 .*image/s\]\r?\n$", bar)
    assert on_a_terminal(monkeypatch, failed).rpartition("\r")[0].rpartition("\r")[2].strip() == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1014978417000448.0, "1.015e+15"),
        (0.98, "0.9800"),
        (53.456, "53.46"),
        (1234.5, "1234"),
        (24408.6, "24,409"),
        (1234567.0, "1.235e+06"),
        (0.00001, "1.000e-05"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_are_as_a_person_reads_them(value, text):
    assert figure(value) == text
