"""Tokens of captions and hidden states of a text encoder, stored beside the latents of their images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gspn_dit.conditioning.text import TextStates
from gspn_dit.data.captions import CaptionedImages, TokenizedCaptions, some_captions, warn_of_long_captions
from gspn_dit.data.extras import Extra
from gspn_dit.data.source import Source
from gspn_dit.text.encoder import TextEncoder
from gspn_dit.text.parts import TextParts
from gspn_dit.text.tokens import tokenize, tokenizer_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INPUT_IDS = "input_ids"  # what models and stores call them


class CaptionTokens:
    """Makes the tensor `input_ids` of a latent store: :class:`~gspn_dit.data.extras.Extras`.

    Args:
        images: The images that are encoded.
        tokenizer: Of transformers, with `model_max_length` L set.
    """

    def __init__(self, images: CaptionedImages, tokenizer: PreTrainedTokenizerBase) -> None:
        self.images, self.tokenizer = images, tokenizer
        self.declared: Mapping[str, Extra] = {
            INPUT_IDS: Extra(torch.int64, (tokenizer.model_max_length,), made_by(tokenizer))
        }

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tokens (n, L) long of the captions of the images of these indices."""
        return {INPUT_IDS: tokenize(self.tokenizer, [self.images.caption(i) for i in indices])}


class CaptionStates:
    """As :class:`CaptionTokens`, and the `encoder_hidden_states` of the captions with their `encoder_attention_mask`.

    Args:
        images: The images that are encoded.
        encoder: Of the captions.
        dtype: In which hidden states are stored.
    """

    def __init__(self, images: CaptionedImages, encoder: TextEncoder, dtype: torch.dtype = torch.float16) -> None:
        self.tokens, self.encoder, self.dtype = CaptionTokens(images, encoder.tokenizer), encoder, dtype
        states, mask = TextStates.names
        length, by = encoder.max_length, encoder.made_by
        self.declared: Mapping[str, Extra] = {
            **self.tokens.declared,
            states: Extra(dtype, (length, encoder.width), by),
            mask: Extra(torch.bool, (length,), by),
        }

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors (n, …) of the captions of the images of these indices."""
        tokens = self.tokens(indices)
        encoded = self.encoder.encode(tokens[INPUT_IDS])
        states, mask = TextStates.names
        return tokens | {states: encoded.hidden_states.to(self.dtype), mask: encoded.mask}


def caption_extras(images: CaptionedImages, parts: TextParts) -> CaptionTokens | CaptionStates:
    """What a store holds of captions: their tokens, and with a frozen text encoder its hidden states."""
    encoder = parts.encoder
    remedy = "shorten them, or give more --tokens if the text encoder takes more"
    warn_of_long_captions(some_captions(images.caption, len(images)), parts.tokenizer, remedy)
    return CaptionTokens(images, parts.tokenizer) if encoder is None else CaptionStates(images, encoder)


def captions_of(source: Source, tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """What says the caption of an image of a source: its own words, or those that its stored tokens stand for."""
    if isinstance(source, TokenizedCaptions):
        return source.caption

    def read(index: int) -> str:
        ids = source.sample(index, names=(INPUT_IDS,))[INPUT_IDS]
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    return read


def made_by(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a store notes of the tokenizer of its captions."""
    return f"tokenizer {tokenizer_sha256(tokenizer)}"
