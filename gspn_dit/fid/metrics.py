"""The figures: Fréchet distance, Inception Score, class accuracy. The first two are torch-fidelity's own functions."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch_fidelity import KEY_METRIC_FID, KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from tqdm import tqdm

from gspn_dit.fid.extractors import Extractor
from gspn_dit.fid.images import ImageSet

BATCH_SIZE = 64

Statistics = dict[str, np.ndarray]


@torch.inference_mode()
def extract(extractor: Extractor, images: ImageSet) -> dict[str, Tensor]:
    """Every layer the extractor gives, for all images: layer name → float32 (N, features) on the CPU."""
    device = next(extractor.network.parameters()).device
    parts: dict[str, list[Tensor]] = {name: [] for name in extractor.network.get_requested_features_list()}
    with ThreadPoolExecutor() as readers, tqdm(total=len(images), unit="image", desc=images.source) as bar:
        for start in range(0, len(images), BATCH_SIZE):
            indices = range(start, min(start + BATCH_SIZE, len(images)))
            batch = torch.stack(list(readers.map(images.read, indices))).to(device)
            layers = extractor.network.convert_features_tuple_to_dict(extractor.network(batch))
            for name, values in layers.items():
                parts[name].append(values.cpu())
            bar.update(len(batch))
    return {name: torch.cat(values) for name, values in parts.items()}


def statistics(features: Tensor, source: str) -> Statistics:
    """Mean `mu` (d,) and unbiased covariance `sigma` (d, d) of features (N, d), float64; N of 2 or more.

    Warns, naming the source, if N is not more than d.
    """
    count, dimensions = features.shape
    if count <= dimensions:
        warnings.warn(
            f"{source}: {count} images for {dimensions} features leave the covariance rank-deficient: "
            "the Fréchet distance is far too high, and compares only with others from as many images",
            stacklevel=2,
        )
    return fid_features_to_statistics(features.double())


def frechet_distance(samples: Statistics, reference: Statistics) -> float:
    """Fréchet distance of two Gaussians (Heusel et al., arXiv 1706.08500, eq. 6).

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), in the features' units squared.
    """
    return fid_statistics_to_metric(samples, reference, verbose=False)[KEY_METRIC_FID]


def inception_score(logits: Tensor) -> tuple[float, float, int]:
    """Mean and deviation over splits of exp E[KL(p(y|x) ‖ p(y))] (Salimans et al., arXiv 1606.03498, section 4).

    Args:
        logits: (N, classes).

    Returns:
        Mean, standard deviation, and how many splits of the shuffled images they are over: torch-fidelity's 10, or N if
        there are fewer images.
    """
    splits = min(DEFAULTS["isc_splits"], len(logits))
    score = isc_features_to_metric(logits, splits, DEFAULTS["samples_shuffle"], DEFAULTS["rng_seed"])
    return score[KEY_METRIC_ISC_MEAN], score[KEY_METRIC_ISC_STD], splits


def class_accuracy(logits: Tensor, class_labels: Tensor) -> float:
    """Share of images whose largest logit (N, classes) is that of the class they were asked for (N,)."""
    return (logits.argmax(dim=1) == class_labels).double().mean().item()
