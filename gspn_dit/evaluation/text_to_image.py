"""The evaluation of images of texts: against real images, against their texts by CLIP, or read back."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("evaluate-t2i", prog="python -m gspn_dit.evaluation.text_to_image")
    raise SystemExit

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gspn_dit.autoencoder.vae import weights_sha256
from gspn_dit.data.captions import METADATA, read_rows
from gspn_dit.data.image_folder import find_images
from gspn_dit.errors import InputError, renamed
from gspn_dit.evaluation.classifiers import CAPTION_ACCURACIES
from gspn_dit.evaluation.clip_score import clip_score, load_clip
from gspn_dit.evaluation.evaluate import check_reference, evaluate, say_figures
from gspn_dit.evaluation.extractors import create_extractor
from gspn_dit.evaluation.image_sets import (
    ImageSet,
    ReferenceStatistics,
    open_cropped,
    open_reference,
    open_samples,
)
from gspn_dit.processes import ALONE, Processes, launched
from gspn_dit.storage.files import check_place
from gspn_dit.text.tokens import warn_of_cut

if TYPE_CHECKING:
    from gspn_dit.commands import EvaluateTextToImageOptions as Options


def main(options: Options) -> None:
    """Score images of texts: Fréchet distance to a reference, CLIP score, caption accuracy; those that were asked for.

    Under `accelerate launch`, the processes share the work.
    """
    out = Path(options.out)
    check_place(out)
    figures: dict[str, Any] = {}
    with launched(options.device) as (processes, device):
        if options.reference is not None:  # opened first: what is wrong shows before the work
            sized, reference = open_both(options.samples, options.reference, options.image_size)
            extractor = create_extractor(options.features, options.weights, device=device)
            check_reference(reference, sized.image_size, extractor)
        if options.clip is not None or options.captions is not None:
            samples = open_samples(options.samples)
            texts = read_texts(Path(options.samples))
            figures |= {"num_samples": len(samples), "samples": samples.source}
        if options.clip is not None:
            clip = load_clip(options.clip, device)
            if processes.is_main:
                warn_of_cut(clip.tokenizer, texts)
        if options.captions is not None:
            figures["caption_accuracy"] = accuracy_of(
                samples, texts, CAPTION_ACCURACIES.load(options.captions), processes
            )
        if options.clip is not None:
            figures["clip_score"] = clip_score(samples, texts, clip, processes)
            figures |= {"clip": options.clip, "clip_weights": weights_sha256(clip.model)}
        if options.reference is not None:
            figures |= evaluate(sized, reference, extractor, processes, quick=True)
            figures["image_size"] = list(sized.image_size)
        if processes.is_main:
            say_figures(figures, out)


def open_both(samples: str, reference: str, image_size: int | None) -> tuple[ImageSet, ImageSet | ReferenceStatistics]:
    """Samples and reference of one size.

    Args:
        samples: A folder.
        reference: A folder, an npz or a named source.
        image_size: Side of the squares that images of folders are cropped to; None takes all as they are.
    """
    if image_size is None:
        opened = open_samples(samples)
        return opened, open_reference(reference, opened.image_size)
    cropped = open_cropped(samples, image_size, "samples")
    if Path(reference).is_dir():
        return cropped, open_cropped(reference, image_size, "reference")
    return cropped, open_reference(reference, cropped.image_size)


def read_texts(folder: Path) -> list[str]:
    """What each image of a folder was asked to show, in the order of :func:`open_samples`.

    Raises :class:`InputError` if nothing says so, or it is not said of these images.
    """
    about = {"argument": "samples", "value": str(folder)}
    if not folder.is_dir():
        raise InputError("is no folder", **about, wanted=f"one of images with {METADATA}")
    if not (table := folder / METADATA).is_file():
        raise InputError(f"nothing says what its images show: no {METADATA}", **about)
    with renamed(source="samples"):
        text_of = dict(read_rows(table))
    names = [file.relative_to(folder).as_posix() for file in sorted(map(Path, find_images(folder)[0]))]
    if untold := [name for name in names if not text_of.get(name)]:
        raise InputError(f"{table}: no text for {untold[0]} ({len(untold)} of {len(names)} images have none)")
    if missing := sorted(text_of.keys() - set(names)):
        raise InputError(
            f"{table}: {missing[0]} is not there ({len(missing)} of {len(text_of)} images are missing)",
            remedy="draw them all first",
        )
    return [text_of[name] for name in names]


def accuracy_of(
    images: ImageSet,
    captions: Sequence[str],
    accuracy: Callable[..., dict[str, float]],
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Shares of images of which each part of their captions is true.

    Args:
        images: Of any one size.
        captions: One for each.
        accuracy: As :data:`CAPTION_ACCURACIES` has them.
        processes: Who shares the work; all of them call this alike.
    """
    own = processes.share(range(len(images)))
    read = own or range(1)  # who has none judges one, which does not count, for the names of the parts
    shares = accuracy((images.read(i) for i in read), [captions[i] for i in read])
    counts = processes.total(torch.tensor([len(own) * share for share in shares.values()], dtype=torch.float64))
    return {part: count / len(images) for part, count in zip(shares, counts.round().tolist(), strict=True)}
