"""Text: tokens for a model that has a text encoder, or the hidden states of a frozen one; no words is the text ""."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gspn_dit.conditioning.condition import Condition
from gspn_dit.errors import InputError

Tokenize = Callable[[Sequence[str]], Tensor]
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


class TextTokens:
    """The condition {"input_ids": (B, L) long}, of a model whose text encoder trains with it.

    Args:
        tokenize: Makes tokens (B, L) of captions, as many for each.
    """

    names: tuple[str, ...] = ("input_ids",)

    def __init__(self, tokenize: Tokenize) -> None:
        self.tokenize = tokenize

    def read(self, given: str | Sequence[str]) -> Condition:
        """The condition of prompts, one or a list. Raises :class:`InputError` for none, or what is no text."""
        return {"input_ids": self.tokenize(prompts_of(given))}

    def null(self, count: int) -> Condition:
        """The condition of `count` images of no words."""
        return {"input_ids": self._no_words.expand(count, -1)}

    def drop(self, condition: Condition, mask: Tensor) -> Condition:
        """The condition with no words where `mask` (B,) bool is true."""
        ids = condition["input_ids"]
        return {"input_ids": torch.where(mask[:, None], self._no_words.to(ids), ids)}

    @cached_property
    def _no_words(self) -> Tensor:
        return self.tokenize([""])


class TextStates:
    """The condition {"encoder_hidden_states": (B, L, D), "encoder_attention_mask": (B, L) bool} of a frozen encoder.

    Args:
        tokenize: Makes tokens (B, L) of captions.
        encode: Makes hidden states (B, L, D) and mask (B, L) of tokens, on the encoder's device.
    """

    names: tuple[str, ...] = ("encoder_hidden_states", "encoder_attention_mask")

    def __init__(self, tokenize: Tokenize, encode: Encode) -> None:
        self.tokens, self.encode = TextTokens(tokenize), encode

    def read(self, given: str | Sequence[str]) -> Condition:
        """The condition of prompts, one or a list. Raises :class:`InputError` for none, or what is no text."""
        return {name: tensor.cpu() for name, tensor in self._encoded(self.tokens.read(given)).items()}

    def null(self, count: int) -> Condition:
        """The condition of `count` images of no words."""
        return {name: row.expand(count, *row.shape[1:]) for name, row in self._no_words.items()}

    def drop(self, condition: Condition, mask: Tensor) -> Condition:
        """The condition with no words where `mask` (B,) bool is true."""
        dropped = {}
        for name, tensor in condition.items():
            of_each = mask.view(-1, *[1] * (tensor.ndim - 1))
            dropped[name] = torch.where(of_each, self._no_words[name].to(tensor), tensor)
        return dropped

    @cached_property
    def _no_words(self) -> Condition:
        return self.read([""])

    def _encoded(self, tokens: Condition) -> Condition:
        return dict(zip(TextStates.names, self.encode(tokens["input_ids"]), strict=True))


class EncodedTokens(TextStates):
    """As :class:`TextStates`, where training data holds tokens: they are encoded as they come, by :meth:`drop`."""

    names = ("input_ids",)

    def drop(self, condition: Condition, mask: Tensor) -> Condition:
        """The states of tokens, and of no words where `mask` (B,) bool is true."""
        return self._encoded(self.tokens.drop(condition, mask))


def prompts_of(given: Any) -> list[str]:
    """A prompt or several as a list. Raises :class:`InputError` for none, or what is no text."""
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, Sequence) or not prompts or not all(isinstance(each, str) for each in prompts):
        raise InputError(argument="prompt", value=given, wanted="a text, or one for each image")
    return list(prompts)
