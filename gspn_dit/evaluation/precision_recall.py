"""Precision and recall: how much of one set of images lies where the other has neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gspn_dit.processes import ALONE, Processes
from gspn_dit.progress import progress

NEIGHBOURS = 3
MOST_POINTS = 50_000  # of either set; its features, 2048 float32 each, are then 410 MB
BLOCK = 1 << 26  # distances held at once, 256 MiB of float32


class Points:
    """The features (n, d) of a set's images: all of them, or `MOST_POINTS` evenly spaced ones of a larger set.

    Args:
        count: How many images the set has.
        dimensions: d.
        device: Where the features are kept.

    Attributes:
        features: float32 (n, d), in the images' order.
    """

    def __init__(self, count: int, dimensions: int, device: torch.device | str = "cpu") -> None:
        kept = min(count, MOST_POINTS)
        self._row_of = torch.full((count,), -1)
        self._row_of[torch.arange(kept) * count // kept] = torch.arange(kept)
        self.features = torch.zeros(kept, dimensions, device=device)

    def update(self, indices: Tensor, features: Tensor) -> None:
        """Take in the features (b, d) of images `indices`."""
        rows = self._row_of[indices]
        kept = rows >= 0
        self.features[rows[kept].to(self.features.device)] = features[kept.to(features.device)]

    def combine(self, processes: Processes) -> None:
        """Make these the features that all processes have taken in: each has zeros where the others have theirs."""
        self.features = processes.total(self.features)


def precision_recall(samples: Tensor, reference: Tensor, processes: Processes = ALONE) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, eq. 1 and 2) with k = 3, as ADM's suite.

    A set's manifold is the union of balls around its points that reach to their third nearest neighbour in the set, the
    point itself not counted. Precision is the share of samples in the reference's manifold, recall the share of the
    reference in the samples'. Distances are float32 here; the suite computes squared ones in float16 unless they
    overflow, which can decide otherwise about points at the very edge of a ball.

    At most `BLOCK` distances are held at a time, whatever the number of points.

    Args:
        samples: Features float32 (N, d), N > 3.
        reference: Features float32 (M, d), M > 3, on the same device.
        processes: Who shares the work; all of them have all the features.
    """
    sample_radii, reference_radii = _squared_radii(samples, processes), _squared_radii(reference, processes)
    sample_inside = torch.zeros(len(samples), device=samples.device)
    reference_inside = torch.zeros(len(reference), device=samples.device)
    for rows, distances in _squared_distances(samples, reference, processes, "precision, recall"):
        sample_inside[rows] = (distances <= reference_radii).any(dim=1).float()
        reference_inside += (distances <= sample_radii[rows, None]).any(dim=0)
    precision = processes.total(sample_inside).double().mean().item()
    return precision, (processes.total(reference_inside) > 0).double().mean().item()


def _squared_radii(points: Tensor, processes: Processes) -> Tensor:
    """Squared distance (N,) of each point to its `NEIGHBOURS`-th nearest other."""
    radii = torch.zeros(len(points), device=points.device)
    for rows, distances in _squared_distances(points, points, processes, "neighbours"):
        distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = 0  # itself: nearest, exactly
        radii[rows] = distances.topk(NEIGHBOURS + 1, largest=False).values[:, -1]
    return processes.total(radii)


def _squared_distances(
    points: Tensor, others: Tensor, processes: Processes, description: str
) -> Iterator[tuple[slice, Tensor]]:
    """This process's blocks of rows of the squared distances (N, M): which rows, and (rows, M)."""
    size = max(1, BLOCK // len(others))
    blocks = [slice(start, min(start + size, len(points))) for start in range(0, len(points), size)]
    norms = others.square().sum(dim=1)
    for rows in progress(
        processes.share(blocks), desc=description, unit="block", leave=False, disable=not processes.is_main
    ):
        distances = torch.addmm(norms, points[rows], others.T, alpha=-2)
        distances += points[rows].square().sum(dim=1, keepdim=True)
        yield rows, distances.clamp_(min=0)
