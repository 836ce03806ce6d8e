"""Tokens of captions, stored beside the latents of their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gspn_dit.data.captions import CaptionedImages
from gspn_dit.data.extras import Extra
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
        self.declared = {INPUT_IDS: Extra(torch.int64, (tokenizer.model_max_length,), made_by(tokenizer))}

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tokens (n, L) long of the captions of the images of these indices."""
        return {INPUT_IDS: tokenize(self.tokenizer, [self.images.caption(i) for i in indices])}


def made_by(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a store notes of the tokenizer of its captions."""
    return f"tokenizer {tokenizer_sha256(tokenizer)}"
