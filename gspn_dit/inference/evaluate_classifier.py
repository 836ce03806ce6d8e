"""What `gspn-dit evaluate-classifier` does: a classifier's top-1 and top-5 accuracy on labelled images."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("evaluate-classifier", prog="python -m gspn_dit.inference.evaluate_classifier")
    raise SystemExit

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gspn_dit.data.pictures import Pictures, open_judged
from gspn_dit.data.preparation import Preparation, Prepared
from gspn_dit.data.workers import load
from gspn_dit.errors import InputError, renamed
from gspn_dit.evaluation.accuracy import scores, tally
from gspn_dit.inference.image_classifier import load_classifier
from gspn_dit.models.classifier import GSPNClassifier
from gspn_dit.precision import autocast
from gspn_dit.processes import Processes, agreed_precision, launched
from gspn_dit.progress import progress
from gspn_dit.storage.files import check_place, write_json

if TYPE_CHECKING:
    from gspn_dit.commands import EvaluateClassifierOptions


def main(options: EvaluateClassifierOptions) -> None:
    """Score a classifier on labelled images, on its own or under `accelerate launch`."""
    if options.out is not None:
        check_place(options.out)
    with launched(options.device) as (processes, device):
        found = evaluate(options, processes, device)
        if processes.is_main:
            said = ", ".join(f"{key} {found[key]:.2f}%" for key in ("top1", "top5"))
            size = f"{found['image_size']} px, crop_pct {found['crop_pct']:g}, {found['interpolation']}"
            print(f"{options.model}: {said} of {found['num_images']:,} images ({size})")
            if options.out is not None:
                Path(options.out).parent.mkdir(parents=True, exist_ok=True)
                write_json(options.out, found)


def evaluate(options: EvaluateClassifierOptions, processes: Processes, device: torch.device) -> dict[str, Any]:
    """Scores, and how the images were prepared; the processes share the images.

    Raises :class:`InputError` if the model or the images cannot be had, or are of different classes.
    """
    model = load_classifier(options.model)
    names = model.pretrained_cfg.get("label_names")
    own = Preparation.of(model.pretrained_cfg)
    preparation = own.changed(options.image_size, options.crop_pct, options.interpolation)
    with renamed(source="data"):
        pictures = open_judged(options.data, preparation.image_size, names and list(names))
    check_classes(model, pictures, options)
    images = Prepared(pictures, preparation)
    precision = agreed_precision(options.mixed_precision, device)
    model.to(device)
    batches = images.shares(options.batch_size, processes.rank, processes.count)
    workers = 0 if images.in_memory else options.num_workers
    loaded = load(images, batches, workers, images.collate, generator=torch.Generator())
    shown = progress(loaded, total=len(batches), desc="classifying", unit="step", disable=not processes.is_main)
    sums = processes.total(tally(model, shown, device, partial(autocast, device, precision.name)))
    return {
        **scores(sums),
        "image_size": preparation.image_size,
        "crop_pct": preparation.crop_pct,
        "interpolation": preparation.interpolation,
        "mixed_precision": precision.name,
    }


def check_classes(model: GSPNClassifier, pictures: Pictures, options: EvaluateClassifierOptions) -> None:
    """Raise :class:`InputError` unless the images' classes are the model's, by name where it knows names."""
    names = model.pretrained_cfg.get("label_names")
    if names is None and len(pictures.class_names) == model.num_classes:
        return
    if names is None or list(names) != pictures.class_names:
        raise InputError(
            f"its classes are not the model's ({len(pictures.class_names)} and {model.num_classes})",
            argument="data",
            value=options.data,
            wanted="images of the classes that the model was trained on",
        )
