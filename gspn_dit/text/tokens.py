"""Captions to the tokens of a CLIP tokenizer, as Stable Diffusion's pipelines make them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gspn_dit.errors import InputError
from gspn_dit.registry import quoted
from gspn_dit.storage.packaged import PACKAGED_TOKENIZERS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def load_tokenizer(folder: str | os.PathLike, length: int | None = None) -> CLIPTokenizer:
    """The CLIP tokenizer of a folder, as transformers saves it, or a packaged one.

    Args:
        folder: The folder, or a name of :data:`~gspn_dit.storage.packaged.PACKAGED_TOKENIZERS`.
        length: Tokens of each caption, with its begin and its end; what the folder says if not given.

    Raises :class:`InputError` if the folder has none.
    """
    from transformers import CLIPTokenizer

    path = PACKAGED_TOKENIZERS.get(str(folder), folder)
    options = {} if length is None else {"model_max_length": length}
    if not os.path.isdir(path):
        raise InputError(
            "no such folder",
            argument="tokenizer",
            value=str(folder),
            wanted=f"{quoted(PACKAGED_TOKENIZERS)}, or a folder with the vocab.json and merges.txt of a CLIPTokenizer",
        )
    try:
        return CLIPTokenizer.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"its files cannot be read ({' '.join(str(error).split())[:300]})",
            argument="tokenizer",
            value=str(folder),
            wanted="a folder with the vocab.json and merges.txt of a CLIPTokenizer",
        ) from error


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """The tokens (B, L) long of B captions, L the tokenizer's `model_max_length`; longer captions are cut."""
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return torch.tensor(tokenizer(list(captions), **options).input_ids)


def tokenizer_sha256(tokenizer: CLIPTokenizer) -> str:
    """What tells two tokenizers apart: SHA-256 of the vocabulary and its ids, in hexadecimal."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(vocabulary.encode()).hexdigest()
