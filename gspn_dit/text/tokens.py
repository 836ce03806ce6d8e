"""Tokenizers of transformers, read from a folder, and the tokens of captions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gspn_dit.errors import InputError, is_whole, warn
from gspn_dit.extras import require_extras

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 77  # tokens of a caption in CLIP's text encoders
LEAST_LENGTH = 3  # a start, a word and an end
_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "vocab.txt")  # one of these holds a vocabulary
# Of case, accents, spaces, digits, other scripts, and words that may stand for ends: what tokenizers treat differently.
_PROBES = ("a Red 3, LEFT of Anna's  1234", " naïve Ångström\n½ 日本 🙂", "<|endoftext|> </s> [SEP]", "")


def load_tokenizer(folder: str | os.PathLike, max_length: int = MAX_LENGTH) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, of any kind that transformers reads; nothing is downloaded.

    A folder with a tokenizer_config.json says itself of which kind it is. One of vocab.json and merges.txt alone is
    CLIP's. The folder of a saved pipeline stands for its `tokenizer`.

    Args:
        folder: Where it lies.
        max_length: Tokens of a caption, its start and end among them; captions of more are cut.

    Raises:
        InputError: There is no tokenizer, it cannot be read or has nothing to pad with, or transformers is missing.
    """
    if not is_whole(max_length) or max_length < LEAST_LENGTH:
        raise InputError(argument="max_length", value=max_length, wanted=f"a whole number from {LEAST_LENGTH}")
    require_extras("t2i")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns where data is read by other processes
    place = within_pipeline(folder, "tokenizer")
    if not place.is_dir():
        raise InputError("no such folder", argument="tokenizer", value=os.fspath(folder), wanted="that of a tokenizer")
    if not any((place / name).is_file() for name in _FILES):
        raise InputError(
            "holds no tokenizer",
            argument="tokenizer",
            value=os.fspath(folder),
            wanted="a folder with vocab.json and merges.txt, or with tokenizer.json",
        )
    from transformers import AutoTokenizer, CLIPTokenizer

    kind = AutoTokenizer if (place / "tokenizer_config.json").is_file() else CLIPTokenizer
    try:
        # transformers 5 cannot cut captions to a tokenizer's own length where a folder does not say it
        tokenizer = kind.from_pretrained(str(place), model_max_length=max_length, local_files_only=True)
    except Exception as error:  # tokenizers raises bare exceptions of its own for what it cannot parse
        raise InputError(
            f"it cannot be read ({' '.join(str(error).split())[:200]})", argument="tokenizer", value=os.fspath(folder)
        ) from error
    if tokenizer.pad_token_id is None:
        raise InputError("it has no token to pad with", argument="tokenizer", value=os.fspath(folder))
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> Tensor:
    """Token ids (B, L) long of captions, padded or cut to the tokenizer's `model_max_length` L."""
    found = tokenizer(list(captions), padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    return torch.tensor(found["input_ids"])


def warn_of_cut(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> None:
    """Warn of captions that are longer than the tokenizer's `model_max_length`, naming the first."""
    if cut := too_long(tokenizer, captions):
        (first, _), most = cut[0], max(length for _, length in cut)
        others = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        warn(f"cut to {tokenizer.model_max_length} tokens, of {most}: {begin_of(first)}{others}")


def too_long(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[tuple[str, int]]:
    """Those of some captions that have more tokens than the tokenizer's `model_max_length`, each with its number."""
    lengths = [len(ids) for ids in tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]]
    counted = zip(captions, lengths, strict=True)
    return [(caption, length) for caption, length in counted if length > tokenizer.model_max_length]


def begin_of(caption: str) -> str:
    """A caption as a message names it: in quotes, and not all of a long one."""
    return f"{caption[:60]!r}{'…' if len(caption) > 60 else ''}"


def token_mask(input_ids: Tensor, pad_token: int, end_token: int | None) -> Tensor:
    """Which tokens (B, L) are a caption's own, bool; the others only fill it up.

    Args:
        input_ids: (B, L).
        pad_token: What fills captions up.
        end_token: What ends them. CLIP fills up with that very token: the first one is the caption's.
    """
    if pad_token != end_token:
        return input_ids != pad_token
    ends = input_ids == end_token
    return ends.cumsum(-1) - ends.long() == 0


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides the tokens of captions, whatever file says it.

    That is the vocabulary, how words are split into its pieces, the length, the tokens that end and fill up and where
    they stand, and what becomes of a few texts, which shows the treatment of case, spaces and marks.
    """
    described = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "splits": _splits(tokenizer),
        "length": tokenizer.model_max_length,
        "ends": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.truncation_side],
        "probes": tokenizer(list(_PROBES), truncation=False, verbose=False)["input_ids"],
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _splits(tokenizer: PreTrainedTokenizerBase) -> list[list[Any]]:
    """How words are split, beside the vocabulary: pairs of pieces to merge, in order, or pieces with their scores."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one that transformers 4 has in Python
        ranks = getattr(tokenizer, "bpe_ranks", {})
        return [list(pair) for pair in sorted(ranks, key=ranks.__getitem__)]
    model = json.loads(backend.to_str())["model"]
    merges = model.get("merges") or (model["vocab"] if isinstance(model["vocab"], list) else [])
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]  # text in older files


def within_pipeline(folder: str | os.PathLike, part: str) -> Path:
    """The folder of that part of a saved pipeline, or the folder itself if it is no pipeline's."""
    place = Path(folder)
    return place / part if (place / "model_index.json").is_file() else place
