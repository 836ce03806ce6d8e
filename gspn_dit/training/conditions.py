"""What the models of a training are conditioned on: the data that says it, how it is read, and what images are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gspn_dit.conditioning import ClassLabels, Conditioning, TextStates
from gspn_dit.config import Config
from gspn_dit.data.caption_tokens import INPUT_IDS, captions_of, made_by
from gspn_dit.data.captions import (
    CaptionedImages,
    TokenizedCaptions,
    check_mirrored,
    open_captioned,
    some_captions,
    warn_of_long_captions,
)
from gspn_dit.data.latent_store import LatentStore, origin_of
from gspn_dit.data.source import Source
from gspn_dit.errors import InputError, not_none, renamed
from gspn_dit.text.parts import load_text_parts
from gspn_dit.training.positions import EpochOrder
from gspn_dit.training.stream import open_source

STATES = TextStates.names[0]


@dataclass
class TrainingCondition:
    """A kind of condition, opened.

    Args:
        source: The training data, whose samples hold what the conditioning reads.
        conditioning: Makes conditions of it.
        model_options: The options of a model that the data decides.
        asked: The arguments of the pipeline's call that draw the images of these numbers of an evaluation.
        parts: What a pipeline needs beside model and VAE, by its arguments.
        record: What a checkpoint notes of it; a run goes on with the same alone.
    """

    source: Source
    conditioning: Conditioning
    model_options: dict[str, Any]
    asked: Callable[[Sequence[int]], dict[str, Any]]
    parts: dict[str, Any] = field(default_factory=dict)
    record: dict[str, str] = field(default_factory=dict)


def open_condition(kind: str, config: Config, device: torch.device) -> TrainingCondition:
    """The data of a configuration, for models that are conditioned on `class_labels` or `text`.

    Raises :class:`InputError` if the data, or what reads it, cannot be had.
    """
    return _OPENERS[kind](config, device)


def _open_classes(config: Config, device: torch.device) -> TrainingCondition:
    for name in ("encoder", "tokenizer"):
        if (given := getattr(config.text, name)) is not None:
            raise InputError(
                f"{config.model.name} draws classes",
                argument=f"text.{name}",
                value=given,
                remedy="leave it out, or name a model of the family gspn-t2i",
            )
    if config.sampling.prompts:
        raise InputError(
            f"{config.model.name} draws classes",
            argument="sampling.prompts",
            value=config.sampling.prompts,
            remedy="leave it out, or name a model of the family gspn-t2i",
        )
    source = open_source(config.data, config.seed)
    count = len(source.class_names)
    return TrainingCondition(
        source,
        ClassLabels(count, source.class_names),
        {"num_classes": count},
        lambda numbers: {"class_labels": [i % count for i in numbers]},
        {"class_names": source.class_names},
    )


def _open_text(config: Config, device: torch.device) -> TrainingCondition:
    """Captions; where none are given, the prompts of the run's grids become the first captions of the data."""
    options = config.text
    with renamed(tokenizer="text.tokenizer", text_encoder="text.encoder", max_length="text.max_tokens"):
        parts = load_text_parts(options.tokenizer, options.encoder, options.max_tokens)
        encoder = parts.encoder
    if parts.text_encoder is not None:
        parts.text_encoder.to(device)
    source: Source = open_source(config.data, config.seed, open_captioned)
    if isinstance(source, CaptionedImages):
        looked_at = some_captions(source.caption, len(source))
        warn_of_long_captions(looked_at, parts.tokenizer, "shorten them, or give more text.max_tokens")
        source = TokenizedCaptions(source, parts.tokenizer)
    stored = encoder is not None and STATES in source.condition_names
    if isinstance(source, LatentStore):
        made = {INPUT_IDS: made_by(parts.tokenizer)} | ({STATES: not_none(encoder).made_by} if stored else {})
        check_store(source, made, config.data.source)
    caption = captions_of(source, parts.tokenizer)
    if config.data.horizontal_flip:
        with renamed("data."):
            check_mirrored(origin_of(source, config.data.source), some_captions(caption, len(source)))
    config.sampling.prompts = config.sampling.prompts or [
        caption(i) for i in range(min(config.sampling.num_images, len(source)))
    ]
    order = EpochOrder(len(source), config.seed)
    return TrainingCondition(
        source,
        parts.conditioning(of_tokens=not stored),
        parts.model_options,
        lambda numbers: {"prompt": [caption(order(i)) for i in numbers]},
        parts._asdict(),
        {"text": parts.made_by},
    )


_OPENERS: dict[str, Callable[[Config, torch.device], TrainingCondition]] = {
    "class_labels": _open_classes,
    "text": _open_text,
}


def check_store(store: LatentStore, made: dict[str, str], name: str) -> None:
    """Raise :class:`InputError` unless a store holds these tensors, made by these."""
    for tensor, by in made.items():
        if tensor not in store.extras:
            raise InputError(
                "it holds no captions", argument="data.source", value=name, remedy="encode with --tokenizer"
            )
        if (found := store.extras[tensor].made_by) != by:
            what = "tokenizer" if tensor == INPUT_IDS else "encoder"
            raise InputError(
                f"its captions are of another {what} ({found}, not {by})",
                argument="data.source",
                value=name,
                remedy=f"name that as text.{what}, with the same text.max_tokens, or encode anew",
            )
