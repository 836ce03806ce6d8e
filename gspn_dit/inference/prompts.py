"""Prompts, and what the UNet of a Stable Diffusion pipeline is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from gspn_dit.data.captions import read_rows
from gspn_dit.errors import renamed
from gspn_dit.text.prompts import prompt_lines

TextToImagePipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, as :func:`~gspn_dit.text.prompts.prompt_lines` reads it, or of a `.jsonl`.

    Of that they are the `text` of every line, as captioned data has it; the pictures need not be there.

    Raises :class:`InputError` if it cannot be read, or has none.
    """
    if path.endswith(".jsonl") and Path(path).is_file():
        with renamed(source="prompts"):
            return [caption for _, caption in read_rows(path)]
    return prompt_lines(path)


@dataclass(frozen=True)
class TextCondition:
    """What the UNet is told of B texts.

    Args:
        hidden_states: Of the text encoders, (B, L, D).
        pooled: SD-XL's (B, P), of the second encoder; None for SD 1.x and 2.x.
    """

    hidden_states: Tensor
    pooled: Tensor | None

    def arguments(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """The UNet's arguments for images (height, width), which SD-XL is told as original, uncropped and wanted."""
        if self.pooled is None:
            return {"encoder_hidden_states": self.hidden_states}
        sizes = torch.tensor([*image_size, 0, 0, *image_size], dtype=torch.float32, device=self.pooled.device)
        added = {"text_embeds": self.pooled, "time_ids": sizes.expand(len(self.pooled), -1)}
        return {"encoder_hidden_states": self.hidden_states, "added_cond_kwargs": added}

    def __add__(self, other: TextCondition) -> TextCondition:
        """These texts and those of another after them."""
        pooled = None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled])
        return TextCondition(torch.cat([self.hidden_states, other.hidden_states]), pooled)


@torch.no_grad()
def encode_prompts(
    pipe: TextToImagePipeline, prompts: Sequence[str], negative_prompt: str | None, guided: bool
) -> tuple[TextCondition, TextCondition | None]:
    """The condition of prompts, and that of what guidance leads away from, as diffusers' pipelines have them.

    Args:
        pipe: On its device.
        prompts: B of them.
        negative_prompt: The text that guidance leads away from; None is no text, as the pipeline has it.
        guided: Whether there is guidance; without, the second condition is None.
    """
    negative = None if negative_prompt is None else [negative_prompt] * len(prompts)
    encoded = pipe.encode_prompt(
        prompt=list(prompts),
        device=pipe.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=negative,
    )
    hidden_states, negative_states, pooled, negative_pooled = (*encoded, None, None)[:4]
    null = TextCondition(negative_states, negative_pooled) if guided else None
    return TextCondition(hidden_states, pooled), null


def truncated(pipe: TextToImagePipeline, prompts: Sequence[str]) -> list[str]:
    """Those of some prompts that have more tokens than the pipeline reads, which leaves off their ends."""
    tokenizer = pipe.tokenizer or pipe.tokenizer_2
    lengths = map(len, tokenizer(list(prompts), verbose=False).input_ids)
    return [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > tokenizer.model_max_length]
