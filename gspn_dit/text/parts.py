"""What reads the text of a text-to-image model of this package: a tokenizer, and maybe a frozen text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from gspn_dit.conditioning.text import EncodedTokens, TextStates, TextTokens
from gspn_dit.storage.packaged import PACKAGED_TOKENIZERS
from gspn_dit.text.encoder import TextEncoder, load_text_encoder
from gspn_dit.text.tokens import load_tokenizer, tokenize, tokenizer_sha256, warn_of_cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextParts(NamedTuple):
    """A tokenizer and a frozen text encoder of transformers; None for a model whose text encoder is its own."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel | None = None

    @property
    def encoder(self) -> TextEncoder | None:
        """Both as one that encodes captions. Raises :class:`InputError` if they do not fit each other."""
        return None if self.text_encoder is None else TextEncoder(self.text_encoder, self.tokenizer)

    @property
    def made_by(self) -> str:
        """What a text is read by, as checksums: a checkpoint says it."""
        encoder = self.encoder
        return f"tokenizer {tokenizer_sha256(self.tokenizer)}" if encoder is None else encoder.made_by

    def conditioning(self, of_tokens: bool = False) -> TextTokens | TextStates:
        """The condition of a model that reads text by these.

        Args:
            of_tokens: Whether training data holds tokens for the frozen encoder, rather than its states.
        """
        read = partial(_tokenize_aloud, self.tokenizer)
        if (encoder := self.encoder) is None:
            return TextTokens(read)
        return (EncodedTokens if of_tokens else TextStates)(read, encoder.encode)

    @property
    def model_options(self) -> dict[str, Any]:
        """The options of a model of this package that reads text by these, which are not to choose."""
        tokenizer = self.tokenizer
        options = {
            "vocab_size": max(tokenizer.get_vocab().values()) + 1,
            "text_length": tokenizer.model_max_length,
            "pad_token": tokenizer.pad_token_id,
            "end_token": tokenizer.eos_token_id,
        }
        if (encoder := self.encoder) is not None:
            options |= {"vocab_size": None, "text_width": encoder.width}
        return options


def load_text_parts(tokenizer: str | None, encoder: str | None, max_tokens: int) -> TextParts:
    """The parts that a configuration names.

    Args:
        tokenizer: A packaged tokenizer or a folder; None for the encoder's own, or the first packaged one.
        encoder: The folder of a frozen text encoder; None for none.
        max_tokens: Tokens of a caption.

    Raises:
        InputError: If they cannot be had, or do not fit each other.
    """
    if encoder is None:
        name = tokenizer or next(iter(PACKAGED_TOKENIZERS))
        return TextParts(load_tokenizer(PACKAGED_TOKENIZERS.get(name, name), max_tokens))
    place = None if tokenizer is None else PACKAGED_TOKENIZERS.get(tokenizer, tokenizer)
    loaded = load_text_encoder(encoder, place, max_length=max_tokens)
    return TextParts(loaded.tokenizer, loaded.model)


def _tokenize_aloud(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> Tensor:
    """Tokens (B, L) of captions; a warning says which are cut."""
    warn_of_cut(tokenizer, captions)
    return tokenize(tokenizer, captions)
