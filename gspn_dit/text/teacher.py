"""A teacher: a Stable Diffusion pipeline by its folder or hub name, and what its UNet is told of a picture.

What it is told is what the pipeline itself tells it when it draws: hidden states of the prompt's tokens, and with SD-XL
a vector of the whole prompt; and six numbers about the picture's size and crop, which are not the pipeline's to know.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_accelerate_available
from torch import Tensor

from gspn_dit.autoencoder.vae import check_vae, is_on_hub, weights_sha256
from gspn_dit.errors import InputError, is_of_files
from gspn_dit.extras import require_extras
from gspn_dit.layers.norm import without_autocast
from gspn_dit.registry import quoted
from gspn_dit.storage.packaged import PACKAGED_TEXT_TO_IMAGE
from gspn_dit.text.tokens import tokenizer_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STORED = torch.float16  # the embeddings of a latent store
KINDS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
INDEX = "model_index.json"


def load_teacher(base: str | os.PathLike) -> DiffusionPipeline:
    """A pipeline of Stable Diffusion 1.x, 2.x or SD-XL on the CPU, in float32, in eval mode and without gradients.

    Args:
        base: A packaged model's name, a local folder, or a hub name.

    Raises:
        InputError: If there is no such pipeline, the hub cannot be reached, it is of another kind, its files cannot be
            read, or its UNet takes more than latents (an inpainting model).
    """
    name = str(base)
    source = PACKAGED_TEXT_TO_IMAGE.get(name, Path(base))
    packaged = f"{quoted(PACKAGED_TEXT_TO_IMAGE)}, " if PACKAGED_TEXT_TO_IMAGE else ""
    remedy = f"give {packaged}the folder of a saved {' or '.join(KINDS)}, or a hub name that can be reached"
    local = source.is_dir()
    only_here = local or not is_on_hub(name, remedy, file=INDEX, argument="base")
    try:
        if local:
            index = json.loads((source / INDEX).read_text())
        else:
            index = DiffusionPipeline.load_config(name, local_files_only=only_here)
    except (OSError, ValueError) as error:
        raise InputError(f"no readable {INDEX} there", argument="base", value=name, remedy=remedy) from error
    kind = index.get("_class_name")
    if kind not in KINDS:
        raise InputError(f"is a {kind!r}", argument="base", value=name, remedy=remedy)
    require_extras("t2i")
    options: dict[str, Any] = {"low_cpu_mem_usage": is_accelerate_available()}
    if kind == "StableDiffusionPipeline":
        options |= {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    try:
        with _without_bars():
            pipe = getattr(diffusers, kind).from_pretrained(
                str(source) if local else name, local_files_only=only_here, **options
            )
    except Exception as error:
        if not is_of_files(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"its files cannot be read ({reason})", argument="base", value=name, remedy=remedy) from error
    check_vae(pipe.vae, name)
    if (takes := pipe.unet.config.in_channels) != (latent := pipe.vae.config.latent_channels):
        raise InputError(
            f"its UNet takes {takes} channels, of which {latent} are latents",
            argument="base",
            value=name,
            wanted="a text-to-image model",
        )
    for part in (pipe.unet, pipe.vae, *text_encoders(pipe)):
        torch.nn.Module.to(part, torch.float32)  # diffusers' own warns of modules to keep in it: of none
        part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def is_xl(pipe: DiffusionPipeline) -> bool:
    """Whether its UNet is told the whole prompt's vector and the picture's size, as SD-XL's is."""
    return pipe.unet.config.addition_embed_type == "text_time"


def text_encoders(pipe: DiffusionPipeline) -> list[torch.nn.Module]:
    """Its text encoders: one, or SD-XL's two."""
    return [part for name in ("text_encoder", "text_encoder_2") if (part := getattr(pipe, name, None)) is not None]


def tokenizers(pipe: DiffusionPipeline) -> list[PreTrainedTokenizerBase]:
    """Its text encoders' tokenizers, in their order."""
    return [part for name in ("tokenizer", "tokenizer_2") if (part := getattr(pipe, name, None)) is not None]


def text_sha256(pipe: DiffusionPipeline) -> str:
    """SHA-256 of its text encoders' weights and of their tokenizers: what tells two pipelines' embeddings apart."""
    parts = [weights_sha256(*text_encoders(pipe)), *map(tokenizer_sha256, tokenizers(pipe))]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def trained_size(pipe: DiffusionPipeline) -> int:
    """The side in pixels of the pictures that it draws when it is not told."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


@torch.no_grad()
def embed(pipe: DiffusionPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts as the UNet is told of them, on the device of the text encoders; the same within autocast as without.

    Returns:
        `encoder_hidden_states` (B, L, D) and, with SD-XL, `text_embeds` (B, P), float32.
    """
    device = _device(pipe)
    with without_autocast(device):
        encoded = pipe.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return _named(encoded[0], encoded[2] if is_xl(pipe) else None)


@torch.no_grad()
def embed_nothing(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """As :func:`embed` of no prompt, without an axis of the batch: that of "", or zeros where the pipeline has those.

    Guidance is away from it, and it takes the place of captions that are dropped.
    """
    device = _device(pipe)
    with without_autocast(device):
        encoded = pipe.encode_prompt([""], device=device, num_images_per_prompt=1, do_classifier_free_guidance=True)
    named = _named(encoded[1], encoded[3] if is_xl(pipe) else None)
    return {name: tensor[0] for name, tensor in named.items()}


@contextmanager
def _without_bars() -> Iterator[None]:
    """In the block, loading draws no progress bars of its own, one for each part."""
    import transformers

    shown = [each for each in (diffusers, transformers) if each.utils.logging.is_progress_bar_enabled()]
    for each in shown:
        each.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for each in shown:
            each.utils.logging.enable_progress_bar()


def _device(pipe: DiffusionPipeline) -> torch.device:
    return next(text_encoders(pipe)[0].parameters()).device


def _named(hidden_states: Tensor, text_embeds: Tensor | None) -> dict[str, Tensor]:
    named = {"encoder_hidden_states": hidden_states.float()}
    return named if text_embeds is None else named | {"text_embeds": text_embeds.float()}
