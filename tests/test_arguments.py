"""The rules of arguments that several rooms take."""

import math

import pytest

from gspn_dit.arguments import check_guidance, check_num_inference_steps
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
