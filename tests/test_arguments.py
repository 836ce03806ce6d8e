"""The rules of arguments that several rooms take."""

import dataclasses
import math
import os

import pytest

from gspn_dit.arguments import check_guidance, check_num_inference_steps, default_workers
from gspn_dit.commands import VERBS
from gspn_dit.errors import InputError


@pytest.mark.parametrize("n", [0, -1, 2.0, "3", None, True])
def test_a_number_of_steps_is_whole_and_positive(n):
    with pytest.raises(InputError, match=rf"^sampling\.num_inference_steps={n!r}: wanted 1 or more$"):
        check_num_inference_steps(n, "sampling.")
    check_num_inference_steps(1)


@pytest.mark.parametrize("n", [1, 1001])
def test_a_number_of_steps_is_within_a_schedulers_limits(n):
    with pytest.raises(InputError, match=f"^num_inference_steps={n}: DDPMScheduler takes 2 to 1000$"):
        check_num_inference_steps(n, least=2, most=1000, who="DDPMScheduler")
    for n in (2, 1000):
        check_num_inference_steps(n, least=2, most=1000, who="DDPMScheduler")


@pytest.mark.parametrize("scale", [0, 0.99, math.nan, math.inf, "2", None])
def test_a_guidance_scale_is_one_or_more(scale):
    with pytest.raises(InputError, match=r"^evaluation\.guidance_scale="):
        check_guidance(scale, (0, 1), "evaluation.")


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.9, 0.1), (-0.1, 1), (0, 1.1), (0.5,), [], 0.5, None])
def test_a_guidance_interval_is_two_shares_in_order(interval):
    with pytest.raises(InputError, match=r"^guidance_interval="):
        check_guidance(1, interval)
    check_guidance(1, [0, 1])


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (4, 4), (64, 4)])
def test_as_many_processes_read_data_as_there_are_cores_for_up_to_four(monkeypatch, cores, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert default_workers() == workers
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert default_workers() == workers


def readers(options):
    """The fields `num_workers` of a dataclass of options and of those in it, each with its dataclass."""
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(field.default_factory):
            yield from readers(field.default_factory)
        elif field.name == "num_workers":
            yield field, options


def test_every_command_that_reads_data_has_that_default_and_says_so():
    found = [each for verb in VERBS.values() for each in readers(verb.options)]
    assert len(found) >= 7
    for field, options in found:
        assert field.default_factory is default_workers, options
        assert "If not given, one for each core, up to 4." in " ".join(options.__doc__.split()), options
