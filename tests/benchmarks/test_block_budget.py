"""benchmarks/block_budget.py: what it counts, and to which operation it gives a time."""

import pytest
import torch

from benchmarks.block_budget import Costs, Options, block_call, by_operation, profiled
from gspn_dit.models import create_model
from gspn_dit.models.macs import count_macs

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def costs_of(**options):
    call = block_call(Options(pixels=64, batch=1, **options), compiled=False)
    with Costs() as costs:
        call()
    return call, costs.by_name


def flops(costs, names):
    return sum(cost.flops for name, cost in costs.items() if name in names)


@pytest.mark.parametrize("name", ["gspn-dit-ti-2", "dit-ti-2"])
def test_backward_has_twice_the_products_of_forward(name):
    _, forward = costs_of(name=name, dtype="float32")
    _, training = costs_of(name=name, dtype="float32", step="training")
    assert flops(training, PRODUCTS) == 3 * flops(forward, PRODUCTS) > 0


def test_a_convolution_s_backward_counts_a_channel_s_own_filter():
    _, forward = costs_of(name="gspn-dit-ti-2", dtype="float32")
    _, training = costs_of(name="gspn-dit-ti-2", dtype="float32", step="training")
    assert training["aten::convolution_backward"].flops == 2 * forward["aten::convolution"].flops > 0


def test_flops_are_those_of_the_model_table():
    """A block's FLOPs are two a multiplication of what a block more adds to a model, the scans' own left out."""
    _, costs = costs_of(name="gspn-dit-ti-2")
    two, one = (create_model("gspn-dit-ti-2", depth=depth, global_layers=0) for depth in (2, 1))
    block = count_macs(two, (8, 8)) - count_macs(one, (8, 8))
    scans = block - sum(cost.flops for cost in costs.values()) / 2
    assert 0 <= scans < 0.05 * block


@pytest.mark.slow
def test_every_operation_of_a_training_step_has_its_time():
    options = Options(name="gspn-dit-ti-2", step="training", pixels=64, batch=1)
    call, costs = costs_of(name=options.name, step=options.step)
    times = by_operation(options, profiled(options, call), set(costs))
    for name in ("gspn_dit::propagate", "gspn_dit::propagate_backward", "aten::convolution", "aten::mm"):
        assert times[name] > 0, name
    assert set(times) <= set(costs)


def test_what_an_operation_calls_is_its_own_time():
    def call():
        with torch.profiler.record_function("outer"), torch.profiler.record_function("middle"):
            torch.ones(1 << 20).sum()
        torch.ones(1 << 10).sum()

    options = Options()
    times = by_operation(options, profiled(options, call), {"outer", "aten::sum"})
    assert times["outer"] > times["aten::sum"] > 0
