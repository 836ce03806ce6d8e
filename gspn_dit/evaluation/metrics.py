"""The figures: Fréchet distance, Inception Score, class accuracy; precision and recall are in `precision_recall`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gspn_dit.evaluation.moments import Statistics, float64_device
from gspn_dit.processes import Processes

ADM_SPLIT = 5000


def frechet_distance(samples: Statistics, reference: Statistics) -> float:
    """Fréchet distance of two Gaussians (Heusel et al., arXiv 1706.08500, eq. 6).

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), in the features' units squared. With Σ₁ = RRᵀ the last trace is that of
    (RᵀΣ₂R)^½, which is symmetric: no complex roots, and where there are fewer images than features, no noise from the
    eigenvalues that are zero but for rounding, which the product's own eigenvalues would add. R is a Cholesky factor
    with pivots, of as many columns as the rank: a tenth of an eigendecomposition's time, and less for few images.
    """
    from scipy.linalg.lapack import dpstrf  # of the extra `eval`: a run without scores needs none

    factor, pivots, rank, _ = dpstrf(samples.sigma, lower=1)
    root = np.tril(factor)[np.argsort(pivots), :rank]
    overlap = np.sqrt(np.linalg.eigvalsh(root.T @ reference.sigma @ root).clip(min=0)).sum()
    shift = samples.mu - reference.mu
    return float(shift @ shift + np.trace(samples.sigma) + np.trace(reference.sigma) - 2 * overlap)


class InceptionScore:
    """exp E[KL(p(y|x) ‖ p(y))] (Salimans et al., arXiv 1606.03498, section 4) over splits of the images.

    As E[KL] = E[Σ p log p] − Σ q log q with q = E[p], a split's two sums are all that is kept, in float64.

    Args:
        split_of: Which split each of the first images is in, int64 (n,), from 0 with none empty; images after those
            are in none.
        classes: How many there are.
        device: Where the sums are kept.
    """

    def __init__(self, split_of: Tensor, classes: int, device: torch.device | str = "cpu") -> None:
        there = float64_device(torch.device(device))
        self.split_of = split_of.to(there)
        self.counts = self.split_of.bincount().double()
        self.probabilities = torch.zeros(len(self.counts), classes, dtype=torch.float64, device=there)
        self.negentropies = torch.zeros(len(self.counts), dtype=torch.float64, device=there)

    def update(self, indices: Tensor, logits: Tensor) -> None:
        """Take in the logits (n, classes) of images `indices`."""
        counted = indices < len(self.split_of)
        logarithms = logits[counted.to(logits.device)].to(self.probabilities.device, torch.float64).log_softmax(dim=1)
        splits = self.split_of[indices[counted].to(self.split_of.device)]
        self.probabilities.index_add_(0, splits, logarithms.exp())
        self.negentropies.index_add_(0, splits, (logarithms.exp() * logarithms).sum(dim=1))

    def combine(self, processes: Processes) -> None:
        """Make these the sums of what all processes have taken in."""
        self.probabilities = processes.total(self.probabilities)
        self.negentropies = processes.total(self.negentropies)

    def score(self) -> tuple[float, float | None]:
        """Mean and standard deviation over the splits, which count alike; no deviation of one split."""
        marginals = self.probabilities / self.counts[:, None]
        divergences = self.negentropies / self.counts - torch.special.xlogy(marginals, marginals).sum(dim=1)
        scores = divergences.exp()
        return scores.mean().item(), scores.std(correction=0).item() if len(scores) > 1 else None


def adm_splits(count: int) -> Tensor:
    """The splits of ADM's suite, 5000 images each in the order they come, or one of all where there are fewer.

    ADM's suite counts what is left after the last whole split as one more, however small: one image among 5,001 scores
    1 and halves the mean. A split's score grows with its images, so only whole ones are averaged here, and what is left
    is left out. Of 50,000 images, the number that papers score, nothing is.
    """
    whole = count // ADM_SPLIT * ADM_SPLIT
    return torch.arange(whole or count) // ADM_SPLIT


def cost_of_order(labels: Sequence[int]) -> float:
    """How many times lower the order of labels keeps ADM's score than a shuffle of them would.

    The score of images that are all recognised as their labels is the mean of exp H(label) over the splits, and no
    split that holds few of the classes can score higher. The shuffle is the measure, for splits of few images per class
    hold some classes more often than others in any order.
    """
    _, classes = torch.as_tensor(labels).unique(return_inverse=True)
    shuffled = classes[torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))]
    in_order, at_random = (_score_of_labels(each) for each in (classes, shuffled))
    return at_random / in_order


def _score_of_labels(classes: Tensor) -> float:
    split_of = adm_splits(len(classes))
    counts = torch.zeros(int(split_of[-1]) + 1, int(classes.max()) + 1, dtype=torch.float64)
    counts.index_put_((split_of, classes[: len(split_of)]), torch.ones((), dtype=torch.float64), accumulate=True)
    shares = counts / counts.sum(dim=1, keepdim=True)
    return torch.special.entr(shares).sum(dim=1).exp().mean().item()


def torch_fidelity_splits(count: int) -> Tensor:
    """The splits of torch-fidelity: 10 of equal size, or as many as there are images, after a shuffle."""
    from torch_fidelity.defaults import DEFAULTS

    splits = min(DEFAULTS["isc_splits"], count)
    ends = torch.arange(1, splits + 1) * count // splits
    shuffled = torch.from_numpy(np.random.RandomState(DEFAULTS["rng_seed"]).permutation(count))
    split_of = torch.empty(count, dtype=torch.int64)
    split_of[shuffled] = torch.searchsorted(ends, torch.arange(count), right=True)
    return split_of


class ClassAccuracy:
    """Share of images whose largest logit is that of the class they were asked for, int64 (N,)."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.hits = torch.zeros((), dtype=torch.int64)

    def update(self, indices: Tensor, logits: Tensor) -> None:
        """Take in the logits (n, classes) of images `indices`."""
        self.hits += (logits.argmax(dim=1).cpu() == self.labels[indices]).sum()

    def combine(self, processes: Processes) -> None:
        """Make this the count of what all processes have taken in."""
        self.hits = processes.total(self.hits)

    def score(self) -> float:
        """The share, from 0 to 1."""
        return self.hits.item() / len(self.labels)
