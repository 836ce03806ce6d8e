"""Precision and recall of points whose neighbours are known."""

import pytest
import torch

from gspn_dit.evaluation import precision_recall as module
from gspn_dit.evaluation.precision_recall import NEIGHBOURS, Points, precision_recall


def line(*positions):
    """Points of a line that runs through 8 dimensions, float32."""
    return torch.tensor(positions, dtype=torch.float32)[:, None] * torch.eye(8)[3]


def test_points_of_a_line():
    # Third-nearest distances: 3, 2, 2, 3 and, of the point at 10, 9. So the manifold is from -3 to 6 and from 1 to 19.
    reference = line(0, 1, 2, 3, 10)
    samples = line(-4, -3, 6, 19, 20, 30)  # the edge of a ball is in it
    # Radii of the samples: 23, 22, 13, 16, 14 and 24; the one around 6 reaches from -7 to 19.
    assert precision_recall(samples, reference) == pytest.approx((3 / 6, 1))
    assert precision_recall(samples + 1000 * torch.eye(8)[0], reference) == (0, 0)


def test_a_dropped_mode_costs_recall_and_a_strange_one_precision():
    generator = torch.Generator().manual_seed(0)
    here = torch.randn(200, 16, generator=generator)
    there = 100 + torch.randn(200, 16, generator=generator)
    precision, recall = precision_recall(here, torch.cat([here, there]))
    assert (precision, recall) == (1, 0.5)
    assert precision_recall(torch.cat([here, there]), here) == (recall, precision)


def test_a_set_is_within_itself():
    points = torch.randn(50, 2048, generator=torch.Generator().manual_seed(1)).relu()
    assert precision_recall(points, points.flip(0)) == (1, 1)


def by_definition(samples, reference):
    """The two equations of the paper, in float64, all distances at once."""

    def inside(points, manifold):
        distances = torch.cdist(manifold.double(), manifold.double(), compute_mode="donot_use_mm_for_euclid_dist")
        radii = distances.sort(dim=1).values[:, NEIGHBOURS]
        to_balls = torch.cdist(points.double(), manifold.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return (to_balls <= radii).any(dim=1).double().mean().item()

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize("block", [1, 100, 1 << 26])
def test_it_is_the_definition_whatever_is_held_at_once(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    generator = torch.Generator().manual_seed(2)
    samples = torch.randint(0, 5, (70, 6), generator=generator).float()  # many ties, exact in float32
    reference = torch.randint(1, 6, (41, 6), generator=generator).float()
    expected = by_definition(samples, reference)
    assert 0 < min(expected) < max(expected) < 1
    assert precision_recall(samples, reference) == pytest.approx(expected, abs=1e-12)


def test_points_of_a_large_set_are_evenly_spaced_ones(monkeypatch):
    monkeypatch.setattr(module, "MOST_POINTS", 4)
    features = torch.arange(10.0)[:, None].expand(10, 3)
    points = Points(10, 3)
    for indices in torch.arange(10).split(3):
        points.update(indices, features[indices])
    assert points.features[:, 0].tolist() == [0, 2, 5, 7]


def test_points_may_come_in_any_order():
    features = torch.randn(10, 3)
    points = Points(10, 3)
    for indices in torch.randperm(10).split(4):
        points.update(indices, features[indices])
    assert torch.equal(points.features, features)
