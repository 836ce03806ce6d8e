"""The evaluation command: images and a reference in, one JSON object of figures out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("evaluate", prog="python -m gspn_dit.evaluation.evaluate")
    raise SystemExit

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gspn_dit.errors import InputError, not_none, warn
from gspn_dit.evaluation.extractors import Extractor, create_extractor
from gspn_dit.evaluation.features import Accumulator, layer_widths, observe
from gspn_dit.evaluation.image_sets import ImageSet, ReferenceStatistics, open_reference, open_samples
from gspn_dit.evaluation.metrics import (
    ADM_SPLIT,
    ClassAccuracy,
    InceptionScore,
    adm_splits,
    cost_of_order,
    frechet_distance,
    torch_fidelity_splits,
)
from gspn_dit.evaluation.moments import Moments, Statistics
from gspn_dit.evaluation.precision_recall import NEIGHBOURS, Points, precision_recall
from gspn_dit.processes import ALONE, Processes, launched
from gspn_dit.storage.files import check_place, is_stdout, replacing

if TYPE_CHECKING:
    from gspn_dit.commands import EvaluateOptions as Options

COSTLY_ORDER = 1.05  # times that the order of samples may lower a score without a word


def main(options: Options) -> None:
    """Score images against a reference as ADM's suite does: FID, sFID, Inception Score, precision and recall.

    With the features of a packaged classifier: its Fréchet distance and score under names of their own, and class
    accuracy of samples of its classes. Under `accelerate launch`, the processes share the work.
    """
    out = Path(options.out)
    check_place(out)
    with launched(options.device) as (processes, device):
        samples = open_samples(options.samples)
        reference = open_reference(options.reference, samples.image_size)
        extractor = create_extractor(options.features, options.weights, device=device)
        metrics = evaluate(samples, reference, extractor, processes)
        if processes.is_main:
            say_figures(metrics, out)


def say_figures(figures: dict[str, Any], out: Path) -> None:
    """Print figures as JSON, and write them to a file."""
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    try:
        if not is_stdout(out):
            print(text, flush=True)
    finally:  # a figure that one place does not take is in the other
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            temporary.write_text(text + "\n")


def evaluate(
    samples: ImageSet,
    reference: ImageSet | ReferenceStatistics,
    extractor: Extractor,
    processes: Processes = ALONE,
    *,
    quick: bool = False,
) -> dict[str, Any]:
    """All figures of samples against a reference, and what they were computed from, ready for JSON.

    | key | what | source |
    |---|---|---|
    | `fid`, `fd` of other features | Fréchet distance of Inception's 2048 pool features | arXiv 1706.08500, eq. 6 |
    | `sfid` | the same of its 2023 spatial features, see `extractors.InceptionFeatures` | arXiv 2103.03841 |
    | `inception_score` | over consecutive splits of 5000, as ADM's suite; `_std`, `_splits` | arXiv 1606.03498 |
    | `inception_score_left_out` | last images that fill no such split, see `metrics.adm_splits` | |
    | `inception_score_torch_fidelity` | over 10 splits of a shuffle, as torch-fidelity; `_std` | the same |
    | `classifier_score`, … | the same formula of a packaged classifier's logits | |
    | `precision`, `recall` | of manifolds of k = 3 neighbours in the pool features | arXiv 1904.06991, eq. 1, 2 |
    | `class_accuracy` | share of samples recognised as the class of their label | |

    ADM is arXiv 2105.05233, its suite evaluations/evaluator.py of openai/guided-diffusion. A figure that cannot be had
    is left out: `sfid` of other features than Inception's or of a reference without its statistics, precision and
    recall of a reference without images or with too few, a deviation over one split, class accuracy without labels or
    where the samples' classes are not the classifier's. They are if they are called the same; where their names are not
    known, if those of the reference are.

    Args:
        samples: What is scored.
        reference: Images, or statistics of them; FID and sFID compare with the statistics if there are any, precision
            and recall with the images.
        extractor: What gives the features.
        processes: Who shares the work. All of them call this alike and get the same figures; by default this one has
            no others, even where torch.distributed runs.
        quick: Leave out sFID, precision and recall, and do not warn of what cannot be had.

    Raises:
        InputError: If the images or the reference's statistics do not suit the extractor or each other, there are too
            few images, or a label is no class of its.
    """
    given = reference if isinstance(reference, ReferenceStatistics) else None
    reference_images = reference.images if isinstance(reference, ReferenceStatistics) else reference
    recognisable = same_classes(samples, reference, extractor)
    _check_samples(samples, extractor, recognisable)
    check_reference(reference, samples.image_size, extractor)
    widths = layer_widths(extractor, samples.image_size)
    enough = reference_images is not None and min(len(samples), len(reference_images)) > NEIGHBOURS
    has_neighbours = enough and not quick
    if processes.is_main:
        warn_of_few(*_fewest(samples, reference), widths[extractor.features])
        _warn_of_splits(samples, extractor)
        if not quick:
            _warn_of_missing(samples, reference, has_neighbours, recognisable, extractor)
    wanted = [extractor.features]
    if extractor.spatial and not quick and (given is None or given.spatial is not None):
        wanted.append(extractor.spatial)

    def observed(images: ImageSet, layers: Sequence[str], scores: Sequence[Accumulator] = ()) -> _Observed:
        """What one pass over a set leaves, after giving the scores its logits."""
        found = {layer: Moments(widths[layer], extractor.device) for layer in layers}
        points = Points(len(images), widths[extractor.features], extractor.device) if has_neighbours else None
        accumulators = [*found.items(), *((extractor.logits, score) for score in scores)]
        accumulators += [(extractor.features, points)] if points else []
        observe(images, extractor, accumulators, processes)
        return _Observed(
            {layer: each.statistics() for layer, each in found.items()}, points.features if points else None
        )

    splits = {extractor.score_key: adm_splits, f"{extractor.score_key}_torch_fidelity": torch_fidelity_splits}
    scores = {
        key: InceptionScore(split(len(samples)), widths[extractor.logits], extractor.device)
        for key, split in splits.items()
    }
    accuracy = ClassAccuracy(torch.tensor(samples.labels)) if recognisable else None
    of_samples = observed(samples, wanted, [*scores.values(), *([accuracy] if accuracy else [])])
    if not isinstance(reference, ReferenceStatistics):
        of_reference = observed(reference, wanted)
    else:
        points = observed(not_none(reference.images), []).points if has_neighbours else None
        of_reference = _Observed({extractor.features: reference.pool}, points)
        if extractor.spatial and reference.spatial is not None:
            of_reference.statistics[extractor.spatial] = reference.spatial

    return {
        **_frechet_figures(of_samples, of_reference, extractor),
        **_score_figures(scores, len(samples), extractor.score_key),
        **_neighbour_figures(of_samples.points, of_reference.points, processes),
        **({"class_accuracy": accuracy.score()} if accuracy else {}),
        "num_samples": len(samples),
        "num_reference": None if isinstance(reference, ReferenceStatistics) else len(reference),
        "samples": samples.source,
        "reference": reference.source,
        "reference_statistics": "mu and sigma of the file" if given else "of its images",
        "features": extractor.name,
        "weights": extractor.weights.name,
        "weights_sha256": extractor.weights_sha256,
    }


def statistics_of(
    images: ImageSet, extractor: Extractor, processes: Processes = ALONE, *, quick: bool = False
) -> ReferenceStatistics:
    """The statistics of images that samples can be compared with, by one pass; without sFID's if `quick`."""
    widths = layer_widths(extractor, images.image_size)
    layers = [extractor.features, *([extractor.spatial] if extractor.spatial and not quick else [])]
    moments = {layer: Moments(widths[layer], extractor.device) for layer in layers}
    observe(images, extractor, list(moments.items()), processes)
    pool, *spatial = (each.statistics() for each in moments.values())
    return ReferenceStatistics(
        images.source,
        extractor.name,
        pool,
        spatial[0] if spatial else None,
        weights_sha256=extractor.weights_sha256,
        class_names=images.class_names,
    )


@dataclass
class _Observed:
    """Of one set: statistics of each layer that has any, and the features (n, d) among which neighbours are sought."""

    statistics: dict[str, Statistics]
    points: Tensor | None


def _frechet_figures(samples: _Observed, reference: _Observed, extractor: Extractor) -> dict[str, float]:
    keys: dict[str | None, str] = {extractor.features: extractor.frechet_key, extractor.spatial: "sfid"}
    return {
        keys[layer]: frechet_distance(found, reference.statistics[layer]) for layer, found in samples.statistics.items()
    }


def _score_figures(scores: dict[str, InceptionScore], count: int, key: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, score in scores.items():
        figures[name], deviation = score.score()
        if deviation is not None:
            figures[f"{name}_std"] = deviation
    figures[f"{key}_splits"] = len(scores[key].counts)
    if left_out := count - len(scores[key].split_of):
        figures[f"{key}_left_out"] = left_out
    figures[f"{key}_convention"] = f"ADM: consecutive splits of {ADM_SPLIT}"
    return figures


def _neighbour_figures(samples: Tensor | None, reference: Tensor | None, processes: Processes) -> dict[str, Any]:
    if samples is None or reference is None:
        return {}
    precision, recall = precision_recall(samples, reference, processes)
    return {
        "precision": precision,
        "recall": recall,
        "precision_recall_neighbours": NEIGHBOURS,
        "precision_recall_samples": len(samples),
        "precision_recall_reference": len(reference),
    }


def same_classes(samples: ImageSet, reference: ImageSet | ReferenceStatistics, extractor: Extractor) -> bool:
    """Whether it is known which class each sample was asked for, and the extractor's logits are these classes."""
    if samples.labels is None or extractor.class_names is None:
        return False
    ours = dict(enumerate(extractor.class_names))
    if samples.class_names is not None:
        return samples.class_names.items() <= ours.items()
    return reference.class_names == ours


def warn_of_few(argument: str, count: int, features: int) -> None:
    """Warn if a set has not more images than features."""
    if count <= features:
        warn(
            f"{argument}: {count} images for {features} features leave the covariance rank-deficient: "
            "the Fréchet distance is far too high, and compares only with others from as many images"
        )


def _fewest(samples: ImageSet, reference: ImageSet | ReferenceStatistics) -> tuple[str, int]:
    """The option that gives the fewest images to compute statistics of, and how many."""
    counts = {"samples": len(samples)}
    if not isinstance(reference, ReferenceStatistics):
        counts["reference"] = len(reference)
    return min(counts.items(), key=lambda item: item[1])


def _warn_of_splits(samples: ImageSet, extractor: Extractor) -> None:
    """Warn of images that come in no random order, or in no whole split, where ADM's score takes them as they come."""
    key, count = extractor.score_key, len(samples)
    if count <= ADM_SPLIT:
        return
    instead = f"read {key}_torch_fidelity, which is over a shuffle of them all"
    cost = cost_of_order(samples.labels) if samples.labels is not None else 1
    if cost > COSTLY_ORDER:
        warn(
            f"samples={samples.source}: consecutive splits of {ADM_SPLIT} hold few of the classes each, and by the "
            f"labels that alone makes {key} {cost:.1f} times lower; {instead}"
        )
    elif samples.labels is None and samples.by_folders:
        warn(
            f"samples={samples.source}: images come folder by folder, and splits of {ADM_SPLIT} in that order hold few "
            f"classes each; {instead}"
        )
    if left_out := count % ADM_SPLIT:
        warn(
            f"samples={samples.source}: the last {left_out} of {count} images fill no split of {ADM_SPLIT} and are "
            f"left out of {key}, for fewer score less; {instead}"
        )


def _warn_of_missing(
    samples: ImageSet,
    reference: ImageSet | ReferenceStatistics,
    has_neighbours: bool,
    recognisable: bool,
    extractor: Extractor,
) -> None:
    """Warn of figures that cannot be had."""
    given = reference if isinstance(reference, ReferenceStatistics) else None
    missing = []
    if given and extractor.spatial and given.spatial is None:
        missing.append("no mu_s and sigma_s in it, so no sfid")
    if given and given.images is None:
        missing.append("no arr_0 in it, so no precision and recall")
    elif not has_neighbours:
        missing.append(f"no precision and recall, which take more than {NEIGHBOURS} images, here and in the samples")
    for what in missing:
        warn(f"reference={reference.source}: {what}")
    if samples.labels is not None and extractor.class_names is not None and not recognisable:
        are = "are others" if samples.class_names or reference.class_names else "are not named"
        warn(
            f"samples={samples.source}: no class_accuracy, for their classes {are}, and features={extractor.name} "
            f"knows {', '.join(extractor.class_names)} alone"
        )


def _check_samples(samples: ImageSet, extractor: Extractor, recognisable: bool) -> None:
    check_images("samples", samples, extractor)
    if not recognisable or samples.labels is None or extractor.class_names is None:
        return
    if unknown := sorted({label for label in samples.labels if not 0 <= label < len(extractor.class_names)}):
        raise InputError(
            f"label={unknown[0]}: features={extractor.name} knows classes 0 to {len(extractor.class_names) - 1}",
            argument="samples",
            value=samples.source,
        )


def check_reference(
    reference: ImageSet | ReferenceStatistics, image_size: tuple[int, int], extractor: Extractor
) -> None:
    """Raise :class:`InputError` if samples of that (height, width) cannot be compared with the reference."""
    if isinstance(reference, ReferenceStatistics) and extractor.name != reference.features:
        raise InputError(
            f"its mu and sigma are of features={reference.features}, not of features={extractor.name}",
            argument="reference",
            value=reference.source,
            wanted=f"images, or the statistics of `gspn-dit reference --features {extractor.name}`",
        )
    if (
        isinstance(reference, ReferenceStatistics)
        and reference.weights_sha256 is not None
        and reference.weights_sha256 != extractor.weights_sha256
    ):
        raise InputError(
            (
                f"its mu and sigma are by weights of SHA-256 {reference.weights_sha256[:12]}…, not by "
                f"{extractor.weights} ({extractor.weights_sha256[:12]}…)"
            ),
            argument="reference",
            value=reference.source,
            remedy="give both commands the same --weights",
        )
    images = reference.images if isinstance(reference, ReferenceStatistics) else reference
    if images is None:
        return
    if not isinstance(reference, ReferenceStatistics):
        check_images("reference", images, extractor)
    if images.image_size != image_size:
        (height, width), (sample_height, sample_width) = images.image_size, image_size
        raise InputError(
            f"its images are {height}x{width}, the samples {sample_height}x{sample_width}",
            argument="reference",
            value=reference.source,
            wanted="one size",
        )


def check_images(argument: str, images: ImageSet, extractor: Extractor) -> None:
    """Raise :class:`InputError` if there is one image alone, or they are of a size that the extractor does not take."""
    if len(images) < 2:
        raise InputError(
            "holds 1 image", argument=argument, value=images.source, remedy="a Fréchet distance needs 2 or more"
        )
    height, width = images.image_size
    side = extractor.image_size
    if side is not None and (height, width) != (side, side):
        raise InputError(
            f"its images are {height}x{width}",
            argument=argument,
            value=images.source,
            remedy=f"features={extractor.name} takes {side}x{side}",
        )
