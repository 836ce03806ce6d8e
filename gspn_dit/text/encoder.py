"""Text encoders of transformers: captions to hidden states."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gspn_dit.autoencoder.vae import weights_sha256
from gspn_dit.errors import InputError
from gspn_dit.extras import require_extras
from gspn_dit.layers.norm import without_autocast
from gspn_dit.text.tokens import MAX_LENGTH, load_tokenizer, token_mask, tokenize, tokenizer_sha256, within_pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The half that encodes text of models that have another, by the model_type of their config.json.
_ENCODERS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "mt5": "MT5EncoderModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}


class EncodedText(NamedTuple):
    """What an encoder makes of captions.

    Args:
        hidden_states: (B, L, D) of its last layer.
        mask: (B, L) bool, true at the tokens of a caption and false at what fills it up.
    """

    hidden_states: Tensor
    mask: Tensor


class TextEncoder:
    """A frozen text encoder with its tokenizer, called with captions or with their tokens.

    It gives the same states inside autocast as outside, without gradients.

    Args:
        model: A text encoder of transformers, which gives `last_hidden_state`.
        tokenizer: Its tokenizer, with `model_max_length` set.
        batch_size: Captions in one forward pass.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval().requires_grad_(False), tokenizer, batch_size
        most = getattr(model.config, "max_position_embeddings", None)
        if most is not None and tokenizer.model_max_length > most:
            raise InputError(
                f"the text encoder has {most} positions",
                argument="max_length",
                value=tokenizer.model_max_length,
                remedy=f"give {most} or less",
            )
        if max(tokenizer.get_vocab().values()) >= model.config.vocab_size:
            raise InputError(
                f"its vocabulary is larger than the text encoder's, {model.config.vocab_size}",
                argument="tokenizer",
                remedy="give the text encoder's own",
            )

    @property
    def width(self) -> int:
        """Channels D of a hidden state."""
        return self.model.config.hidden_size

    @property
    def max_length(self) -> int:
        """Tokens L of a caption."""
        return self.tokenizer.model_max_length

    @property
    def made_by(self) -> str:
        """What states are made by, as a checksum of weights and tokenizer: a store says it."""
        weights = weights_sha256(self.model)
        return f"{type(self.model).__name__} {weights[:16]} tokenizer {tokenizer_sha256(self.tokenizer)[:16]}"

    def __call__(self, captions: Sequence[str]) -> EncodedText:
        """The states of captions, on the encoder's device and in its dtype."""
        return self.encode(tokenize(self.tokenizer, captions))

    @torch.no_grad()
    def encode(self, input_ids: Tensor) -> EncodedText:
        """The states of tokens (B, L) of this tokenizer."""
        input_ids = input_ids.to(self.model.device)
        mask = token_mask(input_ids, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        states = []
        with without_autocast(self.model.device):
            for ids, of_these in zip(input_ids.split(self.batch_size), mask.split(self.batch_size), strict=True):
                states.append(self.model(input_ids=ids, attention_mask=of_these.long()).last_hidden_state)
        return EncodedText(torch.cat(states), mask)


def load_text_encoder(
    folder: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    *,
    max_length: int = MAX_LENGTH,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> TextEncoder:
    """The text encoder of a folder, with its tokenizer; nothing is downloaded.

    Args:
        folder: A CLIPTextModel, a T5EncoderModel or any other encoder that transformers' AutoModel reads, with
            config.json and weights; the folder of a saved pipeline stands for its `text_encoder`.
        tokenizer: The tokenizer's folder; None looks into the encoder's folder, or the pipeline's `tokenizer`.
        max_length: Tokens of a caption; captions of more are cut.
        dtype: Of the weights, and so of the states.
        device: Where it is to be.
        batch_size: Captions in one forward pass.

    Raises:
        InputError: There is none, its weights are not all there, or it does not fit the tokenizer.
    """
    tokens = load_tokenizer(_tokenizer_beside(folder) if tokenizer is None else tokenizer, max_length)
    return TextEncoder(load_text_model(folder, dtype).to(device), tokens, batch_size)


def load_text_model(folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The network alone of what :func:`load_text_encoder` reads. Raises as that does."""
    require_extras("t2i")
    import transformers

    place = within_pipeline(folder, "text_encoder")
    about = {"argument": "text_encoder", "value": os.fspath(folder)}
    if not (place / "config.json").is_file():
        raise InputError(
            "no text encoder there (config.json)", **about, wanted="the folder of a text encoder of transformers"
        )
    try:
        kind = json.loads((place / "config.json").read_text()).get("model_type")
        with without_bars():
            model, info = getattr(transformers, _ENCODERS.get(kind, "AutoModel")).from_pretrained(
                str(place), local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise InputError(f"it cannot be read ({' '.join(str(error).split())[:200]})", **about) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{len(missing)} of its weights are not there, such as {missing[0]}", **about)
    return model.to(dtype)


@contextmanager
def without_bars() -> Iterator[None]:
    """In the block, transformers draws no progress bars."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _tokenizer_beside(folder: str | os.PathLike) -> str | os.PathLike:
    """Where an encoder's tokenizer lies as pipelines are saved: in its own folder, or in the one called tokenizer."""
    place = within_pipeline(folder, "text_encoder")
    beside = place.parent / "tokenizer"
    return beside if place.name == "text_encoder" and beside.is_dir() else folder
