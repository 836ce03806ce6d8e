"""gspn_dit/launches.py: when compiling and recording pay, by sizes alone."""

import pytest
import torch

from gspn_dit.launches import (
    CAPTURE_SECONDS,
    COMPILE_SECONDS,
    Choice,
    Work,
    calls_before_capture,
    compile_pays,
    in_time,
    work_of,
)
from gspn_dit.models import create_model

DIGITS = Work(6, 833_000, 64 * 16, training=True)  # a step of configs/digits.yaml
XL = Work(28, 357_000_000, 64 * 256, training=True)


def meta(name, size):
    with torch.device("meta"):
        return create_model(name, sample_size=size)


@pytest.mark.parametrize("name", ["gspn-dit-ti-1", "gspn-ti-1", "dit-ti-1"])
def test_work_is_that_of_the_blocks_and_of_every_token(name):
    model = meta(name, 8)
    one, two = (work_of(model, (batch, 4, 8, 8)) for batch in (1, 2))
    assert (one.blocks, one.tokens, two.tokens) == (len(model.blocks), 64, 128)
    assert one.weights == sum(p.numel() for p in model.blocks.parameters())
    assert two.compute_seconds == pytest.approx(2 * one.compute_seconds)
    assert two.launch_seconds == one.launch_seconds  # an operation on more is an operation


def test_a_patch_of_two_makes_a_quarter_of_the_tokens():
    assert work_of(meta("gspn-dit-ti-2", 8), (3, 4, 8, 8)).tokens == 3 * 16


def test_a_training_step_is_three_times_a_forward():
    forward, step = (Work(2, 1000, 100, training=training) for training in (False, True))
    assert step.compute_seconds == pytest.approx(3 * forward.compute_seconds)
    assert step.launch_seconds > forward.launch_seconds


def test_the_digits_wait_for_launches_and_imagenet_does_not():
    assert DIGITS.is_launch_bound and not XL.is_launch_bound
    assert work_of(meta("gspn-dit-ti-1", 4), (32, 4, 4, 4)).is_launch_bound
    assert not work_of(meta("gspn-dit-xl-2", 32), (32, 4, 32, 32)).is_launch_bound


@pytest.mark.parametrize("work", [DIGITS, XL])
@pytest.mark.parametrize("graphed", [False, True])
def test_more_steps_never_make_compiling_pay_less(work, graphed):
    chosen = [compile_pays(work, 10**n, graphed)[0] for n in range(9)]
    assert chosen == sorted(chosen) and not chosen[0] and chosen[-1]


def test_nothing_is_compiled_for_no_step():
    assert compile_pays(XL, 0, False)[0] is False


def test_a_graph_leaves_less_to_save():
    steps = next(n for n in range(1, 10**6, 100) if compile_pays(DIGITS, n, False)[0])
    assert not compile_pays(DIGITS, steps, True)[0]


def test_passes_of_a_step_count():
    steps = next(n for n in range(1, 10**6) if compile_pays(XL, n, False)[0])
    assert compile_pays(XL, steps // 2, False, passes=4)[0]


def test_the_recipes_compile_as_their_length_says():
    assert not compile_pays(DIGITS, 1200, True)[0]
    assert compile_pays(XL, 400_000, False) == (
        True,
        "400,000 steps save about 5 h, compiling takes about 58 s",
    )


def test_a_recording_waits_as_long_as_it_takes_itself():
    small = Work(6, 833_000, 512)
    calls = calls_before_capture(small)
    assert (calls - 1) * small.launch_seconds < CAPTURE_SECONDS <= calls * small.launch_seconds
    assert calls_before_capture(Work(28, 357_000_000, 32 * 256)) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (1.2, "1 s"), (COMPILE_SECONDS, "58 s"), (300, "5 min"), (7199, "120 min"), (18_000, "5 h")],
)
def test_durations_are_for_a_person(seconds, words):
    assert in_time(seconds) == words


@pytest.mark.usefixtures("as_a_command_says_it")
@pytest.mark.parametrize(
    ("asked", "on", "reason", "line"),
    [
        ("auto", True, "it pays", "it is done (compile auto: it pays)\n"),
        ("auto", False, "on cpu", "it is left (compile auto: on cpu)\n"),
        (True, True, "", "it is done (compile true)\n"),
        (False, False, "", "it is left (compile false)\n"),
    ],
)
def test_a_choice_is_said_in_one_line(capsys, asked, on, reason, line):
    Choice("compile", asked, on, reason, "it is done", "it is left").say()
    assert capsys.readouterr().out == line
