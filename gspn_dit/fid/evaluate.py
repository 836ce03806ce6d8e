"""The evaluation command: images and a reference in, one JSON object of figures out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspn_dit.devices import choose_device
from gspn_dit.errors import InputError
from gspn_dit.fid.extractors import Extractor, FeatureName, create_extractor
from gspn_dit.fid.images import ImageSet, ReferenceStatistics, open_reference, open_samples
from gspn_dit.fid.metrics import class_accuracy, extract, frechet_distance, inception_score, statistics
from gspn_dit.files import replacing
from gspn_dit.options import require


@dataclass
class Options:
    """Evaluation of generated images.

    Args:
        samples: Folder of images (labels.csv beside them: file,label), or an npz of uint8 NHWC arr_0 (and labels).
        reference: What to compare with: a folder, an npz of images or of ADM's mu and sigma, or `digits`, `photos`,
            `digits:test`, `photos:test`.
        features: `inception`, or `digits` for the packaged digits classifier.
        out: The JSON file to write.
        weights: Weights file of the features; null takes the packaged ones, or torch-fidelity's download.
        device: `auto` takes the accelerator if there is one.
    """

    samples: str
    reference: str
    features: FeatureName
    out: str
    weights: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        require(not Path(self.out).is_dir(), "out", self.out, "the name of a file to write, this is a folder")


def main(options: Options) -> None:
    """Score a folder or npz of images against a reference: FID, Inception Score, and class accuracy for digits."""
    out = Path(options.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out}: its folder cannot be made ({error.strerror})") from error
    device = choose_device(options.device)
    samples = open_samples(options.samples)
    reference = open_reference(options.reference, samples.image_size)
    metrics = evaluate(samples, reference, create_extractor(options.features, options.weights, device=device))

    text = json.dumps(metrics, indent=2, ensure_ascii=False)
    with replacing(out) as temporary:
        temporary.write_text(text + "\n")
    print(text)


def evaluate(samples: ImageSet, reference: ImageSet | ReferenceStatistics, extractor: Extractor) -> dict[str, Any]:
    """All figures of samples against a reference, and what they were computed from, ready for JSON.

    `fid` for Inception features and `fd` for others, `inception_score` with its standard deviation and splits,
    `class_accuracy` if the samples carry labels and the extractor knows their classes, `num_samples`.

    Raises:
        InputError: If the images or the reference's statistics do not suit the extractor, there are too few images, or
            a label is no class of its.
    """
    _check_images("samples", samples, extractor)
    given = isinstance(reference, ReferenceStatistics)
    if not given:
        _check_images("reference", reference, extractor)
    elif extractor.name != "inception":
        raise InputError(
            f"reference={reference.source}: its mu and sigma are of Inception's features, not of "
            f"features={extractor.name}; wanted images"
        )
    labelled = samples.labels is not None and extractor.num_classes is not None
    if labelled:
        _check_labels(samples, extractor)

    layers = extract(extractor, samples)
    if given:
        reference_statistics = {"mu": reference.mu, "sigma": reference.sigma}
    else:
        reference_statistics = statistics(extract(extractor, reference)[extractor.features], "reference")
    distance = frechet_distance(statistics(layers[extractor.features], "samples"), reference_statistics)
    score, deviation, splits = inception_score(layers[extractor.logits])
    accuracy = {}
    if labelled:
        accuracy["class_accuracy"] = class_accuracy(layers[extractor.logits], torch.tensor(samples.labels))
    return {
        extractor.frechet_key: distance,
        "inception_score": score,
        "inception_score_std": deviation,
        "inception_score_splits": splits,
        **accuracy,
        "num_samples": len(samples),
        "num_reference": None if given else len(reference),
        "samples": samples.source,
        "reference": reference.source,
        "reference_statistics": "mu and sigma of the file" if given else "of its images",
        "features": extractor.name,
        "weights": extractor.weights.name,
        "weights_sha256": extractor.weights_sha256,
    }


def _check_images(argument: str, images: ImageSet, extractor: Extractor) -> None:
    if len(images) < 2:
        raise InputError(f"{argument}={images.source}: holds 1 image; a Fréchet distance needs 2 or more")
    height, width = images.image_size
    side = extractor.image_size
    if side is not None and (height, width) != (side, side):
        raise InputError(
            f"{argument}={images.source}: its images are {height}x{width}; "
            f"features={extractor.name} takes {side}x{side}"
        )


def _check_labels(samples: ImageSet, extractor: Extractor) -> None:
    if unknown := sorted({label for label in samples.labels or () if not 0 <= label < extractor.num_classes}):
        raise InputError(
            f"samples={samples.source}: label={unknown[0]}: features={extractor.name} knows classes "
            f"0 to {extractor.num_classes - 1}"
        )
