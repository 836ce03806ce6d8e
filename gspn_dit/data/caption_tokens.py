"""The tokens of captions: as images come, or stored beside their latents."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gspn_dit.data.captions import CaptionedImages
from gspn_dit.data.extras import Extra
from gspn_dit.data.images import ImageDataset
from gspn_dit.errors import InputError
from gspn_dit.text.tokens import token_ids, tokenizer_sha256

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

INPUT_IDS = "input_ids"  # what models and stores call them


class CaptionTokens:
    """Tokens of captions for a latent store: :class:`~gspn_dit.data.extras.Extras` of one tensor, `input_ids`.

    Args:
        images: The images that are encoded.
        tokenizer: Makes tokens of their captions.

    Raises :class:`InputError` if the images have no captions.
    """

    def __init__(self, images: ImageDataset, tokenizer: CLIPTokenizer) -> None:
        self.images, self.tokenizer = captioned(images), tokenizer
        self.declared = {INPUT_IDS: Extra(torch.int64, (tokenizer.model_max_length,), made_by(tokenizer))}

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tokens (n, L) long of the captions of these images."""
        return {INPUT_IDS: token_ids(self.tokenizer, [self.images.caption(i) for i in indices])}


class TokenizedImages(ImageDataset):
    """Captioned images whose samples hold the tokens of their captions, as training takes them.

    Args:
        images: The images.
        tokenizer: Makes tokens of their captions.

    Raises :class:`InputError` if the images have no captions.
    """

    condition_names = (INPUT_IDS,)

    def __init__(self, images: ImageDataset, tokenizer: CLIPTokenizer) -> None:
        super().__init__(images.class_names, images.image_size)
        self.images, self.tokenizer = captioned(images), tokenizer

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Tensor, int]:
        """As the images', but in the place of its label an image's index: of an unreadable one, that of its stand-in."""
        return self.images.load(index)[0], index

    def sample(self, index: int, flip: bool = False, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """`image` uint8 (3, image_size, image_size), mirrored if asked, and `input_ids` (L,) long."""
        image, shown = self[index]
        ids = token_ids(self.tokenizer, [self.images.caption(shown)])[0]
        return {"image": image.flip(-1) if flip else image, INPUT_IDS: ids}


def captioned(images: ImageDataset) -> CaptionedImages:
    """The images, which have captions. Raises :class:`InputError` if they have none."""
    if not isinstance(images, CaptionedImages):
        raise InputError(
            "its images have no captions",
            argument="source",
            wanted="a captioned source, such as `scenes`, or a folder of pictures with captions",
        )
    return images


def made_by(tokenizer: CLIPTokenizer) -> str:
    """What a store notes of the tokenizer of its captions."""
    return f"CLIPTokenizer {tokenizer_sha256(tokenizer)}"
