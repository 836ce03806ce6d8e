"""The evaluation command: images and a reference in, one JSON object of figures out."""

from __future__ import annotations

from gspn_dit.commands import EvaluateOptions as Options
from gspn_dit.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("evaluate", prog="python -m gspn_dit.fid.evaluate"))

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspn_dit.errors import InputError
from gspn_dit.fid.extractors import Extractor, create_extractor
from gspn_dit.fid.features import Accumulator, layer_widths, observe
from gspn_dit.fid.images import ImageSet, ReferenceStatistics, open_reference, open_samples
from gspn_dit.fid.metrics import (
    ADM_SPLIT,
    ClassAccuracy,
    InceptionScore,
    adm_splits,
    frechet_distance,
    torch_fidelity_splits,
)
from gspn_dit.fid.moments import Moments, Statistics
from gspn_dit.fid.neighbours import NEIGHBOURS, Points, precision_recall
from gspn_dit.fid.processes import ALONE, Processes, launched
from gspn_dit.files import check_place, replacing


def main(options: Options) -> None:
    """Score images against a reference as ADM's suite does: FID, sFID, Inception Score, precision and recall.

    Also class accuracy for digits and photos. Under `accelerate launch`, the processes share the work.
    """
    out = Path(options.out)
    make_folder_of(out)
    with launched(options.device) as (processes, device):
        samples = open_samples(options.samples)
        reference = open_reference(options.reference, samples.image_size)
        extractor = create_extractor(options.features, options.weights, device=device)
        metrics = evaluate(samples, reference, extractor, processes)
        if not processes.is_main:
            return
        text = json.dumps(metrics, indent=2, ensure_ascii=False)
        with replacing(out) as temporary:
            temporary.write_text(text + "\n")
        print(text)


def make_folder_of(out: Path) -> None:
    """Make the folder that a file is to be written into. Raises :class:`InputError`."""
    check_place(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out}: its folder cannot be made ({error.strerror})") from error


def evaluate(
    samples: ImageSet,
    reference: ImageSet | ReferenceStatistics,
    extractor: Extractor,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """All figures of samples against a reference, and what they were computed from, ready for JSON.

    | key | what | source |
    |---|---|---|
    | `fid`, `fd` of other features | Fréchet distance of Inception's 2048 pool features | arXiv 1706.08500, eq. 6 |
    | `sfid` | the same of its 2023 spatial features, see `extractors.InceptionFeatures` | arXiv 2103.03841 |
    | `inception_score` | over consecutive splits of 5000, as ADM's suite; `_std`, `_splits` | arXiv 1606.03498 |
    | `inception_score_torch_fidelity` | over 10 splits of a shuffle, as torch-fidelity; `_std` | the same |
    | `precision`, `recall` | of manifolds of k = 3 neighbours in the pool features | arXiv 1904.06991, eq. 1, 2 |
    | `class_accuracy` | share of samples recognised as the class of their label | |

    ADM is arXiv 2105.05233, its suite evaluations/evaluator.py of openai/guided-diffusion. A figure that cannot be had
    is left out: `sfid` of other features than Inception's or of a reference without its statistics, precision and
    recall of a reference without images or with too few, class accuracy without labels or known classes.

    Args:
        samples: What is scored.
        reference: Images, or statistics of them; FID and sFID compare with the statistics if there are any, precision
            and recall with the images.
        extractor: What gives the features.
        processes: Who shares the work. All of them call this alike and get the same figures; by default this one has
            no others, even where torch.distributed runs.

    Raises:
        InputError: If the images or the reference's statistics do not suit the extractor or each other, there are too
            few images, or a label is no class of its.
    """
    given = reference if isinstance(reference, ReferenceStatistics) else None
    reference_images = given.images if given else reference
    _check_samples(samples, extractor)
    check_reference(reference, samples.image_size, extractor)
    widths = layer_widths(extractor, samples.image_size)
    has_neighbours = reference_images is not None and min(len(samples), len(reference_images)) > NEIGHBOURS
    if processes.is_main:
        _warn(samples, reference, has_neighbours, widths[extractor.features])

    def observed(images: ImageSet, moments: bool, scores: Sequence[Accumulator] = ()) -> _Observed:
        """What one pass over a set leaves, after giving the scores its logits."""
        layers = [extractor.features, *([extractor.spatial] if extractor.spatial else [])] if moments else []
        found = {layer: Moments(widths[layer], extractor.device) for layer in layers}
        points = Points(len(images), widths[extractor.features], extractor.device) if has_neighbours else None
        accumulators = [*found.items(), *((extractor.logits, score) for score in scores)]
        accumulators += [(extractor.features, points)] if points else []
        observe(images, extractor, accumulators, processes)
        return _Observed({layer: each.statistics() for layer, each in found.items()}, points and points.features)

    splits = {"inception_score": adm_splits, "inception_score_torch_fidelity": torch_fidelity_splits}
    scores = {
        key: InceptionScore(split(len(samples)), widths[extractor.logits], extractor.device)
        for key, split in splits.items()
    }
    accuracy = ClassAccuracy(torch.tensor(samples.labels)) if _recognisable(samples, extractor) else None
    of_samples = observed(samples, True, [*scores.values(), *([accuracy] if accuracy else [])])
    if given is None:
        of_reference = observed(reference, True)
    else:
        points = observed(given.images, False).points if has_neighbours else None
        of_reference = _Observed({extractor.features: given.pool, extractor.spatial: given.spatial}, points)

    return {
        **_frechet_figures(of_samples, of_reference, extractor),
        **_score_figures(scores),
        **(_neighbour_figures(of_samples.points, of_reference.points, processes) if has_neighbours else {}),
        **({"class_accuracy": accuracy.score()} if accuracy else {}),
        "num_samples": len(samples),
        "num_reference": None if given else len(reference),
        "samples": samples.source,
        "reference": reference.source,
        "reference_statistics": "mu and sigma of the file" if given else "of its images",
        "features": extractor.name,
        "weights": extractor.weights.name,
        "weights_sha256": extractor.weights_sha256,
    }


@dataclass
class _Observed:
    """Of one set: statistics of each layer that has any, and the features (n, d) among which neighbours are sought."""

    statistics: dict[str | None, Statistics | None]
    points: Tensor | None


def _frechet_figures(samples: _Observed, reference: _Observed, extractor: Extractor) -> dict[str, float]:
    keys = {extractor.features: extractor.frechet_key, extractor.spatial: "sfid"}
    return {
        keys[layer]: frechet_distance(found, reference.statistics[layer])
        for layer, found in samples.statistics.items()
        if reference.statistics[layer] is not None
    }


def _score_figures(scores: dict[str, InceptionScore]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for key, score in scores.items():
        figures[key], figures[f"{key}_std"] = score.score()
    figures["inception_score_splits"] = len(scores["inception_score"].counts)
    figures["inception_score_convention"] = f"ADM: consecutive splits of {ADM_SPLIT}"
    return figures


def _neighbour_figures(samples: Tensor, reference: Tensor, processes: Processes) -> dict[str, Any]:
    precision, recall = precision_recall(samples, reference, processes)
    return {
        "precision": precision,
        "recall": recall,
        "precision_recall_neighbours": NEIGHBOURS,
        "precision_recall_samples": len(samples),
        "precision_recall_reference": len(reference),
    }


def _recognisable(samples: ImageSet, extractor: Extractor) -> bool:
    """Whether it is known what the samples should show, and the extractor knows such classes."""
    return samples.labels is not None and extractor.num_classes is not None


def warn_of_few(argument: str, count: int, features: int) -> None:
    """Warn if a set has not more images than features."""
    if count <= features:
        warnings.warn(
            f"{argument}: {count} images for {features} features leave the covariance rank-deficient: "
            "the Fréchet distance is far too high, and compares only with others from as many images",
            stacklevel=2,
        )


def _warn(samples: ImageSet, reference: ImageSet | ReferenceStatistics, has_neighbours: bool, features: int) -> None:
    """Warn of what makes a figure hard to compare, or keeps it from being had."""
    given = isinstance(reference, ReferenceStatistics)
    counts = {"samples": len(samples)} | ({} if given else {"reference": len(reference)})
    fewest = min(counts, key=counts.__getitem__)
    warn_of_few(fewest, counts[fewest], features)
    if samples.by_folders and len(samples) > ADM_SPLIT:
        warnings.warn(
            f"samples={samples.source}: images come folder by folder, and splits of {ADM_SPLIT} in that order hold few "
            "classes each; of the Inception Scores read inception_score_torch_fidelity, which is over a shuffle",
            stacklevel=2,
        )
    missing = []
    if given and reference.spatial is None:
        missing.append("no mu_s and sigma_s in it, so no sfid")
    if given and reference.images is None:
        missing.append("no arr_0 in it, so no precision and recall")
    elif not has_neighbours:
        missing.append(f"no precision and recall, which take more than {NEIGHBOURS} images, here and in the samples")
    for what in missing:
        warnings.warn(f"reference={reference.source}: {what}", stacklevel=2)


def _check_samples(samples: ImageSet, extractor: Extractor) -> None:
    _check_images("samples", samples, extractor)
    if not _recognisable(samples, extractor):
        return
    if unknown := sorted({label for label in samples.labels if not 0 <= label < extractor.num_classes}):
        raise InputError(
            f"samples={samples.source}: label={unknown[0]}: features={extractor.name} knows classes "
            f"0 to {extractor.num_classes - 1}"
        )


def check_reference(
    reference: ImageSet | ReferenceStatistics, image_size: tuple[int, int], extractor: Extractor
) -> None:
    """Raise :class:`InputError` if samples of that (height, width) cannot be compared with the reference."""
    given = isinstance(reference, ReferenceStatistics)
    if given and extractor.name != "inception":
        raise InputError(
            f"reference={reference.source}: its mu and sigma are of Inception's features, not of "
            f"features={extractor.name}; wanted images"
        )
    images = reference.images if given else reference
    if images is None:
        return
    if not given:
        _check_images("reference", images, extractor)
    if images.image_size != image_size:
        (height, width), (sample_height, sample_width) = images.image_size, image_size
        raise InputError(
            f"reference={reference.source}: its images are {height}x{width}, the samples "
            f"{sample_height}x{sample_width}; wanted one size"
        )


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
