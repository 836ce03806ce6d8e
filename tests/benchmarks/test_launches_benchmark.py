"""benchmarks/launches.py: what it counts."""

import pytest
import torch

from benchmarks.launches import Launches, Options, denoising, launches_of, training_step

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_views_and_what_allocates_are_no_launches():
    x = torch.ones(4, 4)
    with Launches() as launches:
        torch.empty(3)
        x.view(16)[2:].detach()
        assert launches.count == 0
        torch._foreach_add_([x, x], 1)  # one operation on a list
        x.t() @ x
    assert launches.count == 2


@pytest.mark.slow
def test_a_graph_is_one_launch_for_hundreds():
    usual, graphed = (launches_of(training_step(Options(precision="no"), graphed)) for graphed in (False, True))
    assert usual > 500 and graphed < usual / 10


@pytest.mark.slow
def test_a_denoising_step_more_costs_the_same():
    counts = [launches_of(denoising(Options(precision="no"), False, steps)) for steps in (3, 4, 5)]
    assert counts[1] - counts[0] == counts[2] - counts[1] > 100
