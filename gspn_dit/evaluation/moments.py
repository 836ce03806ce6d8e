"""Mean and covariance of features, without holding the features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gspn_dit.processes import Processes


@dataclass(frozen=True)
class Statistics:
    """Mean `mu` (d,) and unbiased covariance `sigma` (d, d) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


def float64_device(device: torch.device) -> torch.device:
    """Where float64 sums are kept for features on a device: there, or on the CPU if it has no float64 (Apple's)."""
    return torch.device("cpu") if device.type == "mps" else device


class Moments:
    """Count, mean and scatter of features (n, d) that come in batches, in float64.

    A batch's own mean and scatter are merged into those so far (Chan, Golub & LeVeque, "Updating formulae and a
    pairwise algorithm for computing sample variances", 1979), so that nothing is lost where the mean is large beside
    the deviations, as it is in sums of squares.
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu") -> None:
        there = float64_device(torch.device(device))
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device=there)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=there)

    def update(self, indices: Tensor, features: Tensor) -> None:
        """Take in a batch (n, d); which images it is of does not matter."""
        features = features.to(self.mean.device, torch.float64)
        before, self.count = self.count, self.count + len(features)
        mean = features.mean(dim=0)
        centred, shift = features - mean, mean - self.mean
        self.scatter.addmm_(centred.T, centred)
        self.scatter.addr_(shift, shift, alpha=before * len(features) / self.count)
        self.mean += shift * (len(features) / self.count)

    def combine(self, processes: Processes) -> None:
        """Make these the moments of what all processes have taken in."""
        if processes.count == 1:
            return
        count = int(processes.total(torch.tensor(self.count)))
        mean = processes.total(self.mean * (self.count / count))
        shift = self.mean - mean
        self.scatter = processes.total(self.scatter.addr_(shift, shift, alpha=self.count))
        self.count, self.mean = count, mean

    def statistics(self) -> Statistics:
        """Mean and unbiased covariance; of 2 images or more."""
        return Statistics(self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy())
