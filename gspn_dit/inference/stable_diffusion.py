"""A trained text-to-image model as diffusers' own StableDiffusionPipeline, and its pictures of prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from torch import Tensor

from gspn_dit.autoencoder import load_vae
from gspn_dit.autoencoder.vae import LatentScaling
from gspn_dit.data.caption_tokens import made_by
from gspn_dit.diffusion import image_generator
from gspn_dit.diffusion.stable_diffusion import stable_diffusion_scheduler
from gspn_dit.errors import InputError
from gspn_dit.inference.loading import vae_of_run
from gspn_dit.inference.run_description import read_config
from gspn_dit.models.text_to_image import TextToImageModel
from gspn_dit.storage.packaged import PACKAGED_TOKENIZERS
from gspn_dit.storage.pictures import save_grid
from gspn_dit.storage.run_folder import Checkpoint
from gspn_dit.text.tokens import MAX_LENGTH, load_tokenizer

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

AT_ONCE = 16  # images in a call of the pipeline, for a grid


def is_text_to_image(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a text-to-image model of Stable Diffusion's architecture."""
    try:
        return json.loads(checkpoint.ema_config.read_text()).get("_class_name") == TextToImageModel.__name__
    except (OSError, ValueError):  # who loads it says what is wrong
        return False


def load_stable_diffusion(checkpoint: Checkpoint, vae: str | None = None) -> StableDiffusionPipeline:
    """The pipeline of a checkpoint's averaged weights, with the run's VAE, tokenizer and sampler.

    Args:
        checkpoint: Of a run of `train-t2i`.
        vae: Folder or hub name of a VAE in place of the run's, for example one that was moved.

    Raises :class:`InputError` if something of it cannot be had.
    """
    config = read_config(checkpoint.config)
    model = TextToImageModel.from_pretrained(checkpoint.ema, use_safetensors=True).eval()
    own = vae_of_run(checkpoint, config["data"]["vae"], None if vae is None else load_vae(vae), vae)
    tokenizer = load_tokenizer(tokenizer_of(config["model"]), token_length(model))
    if (found := made_by(tokenizer)) != (trained := checkpoint.read_metadata()["tokens"]):
        raise InputError(
            f"it was trained with captions read by {trained}, and what lies there now is {found}",
            argument="model.tokenizer",
            value=os.fspath(tokenizer_of(config["model"])),
            remedy="bring the run's tokenizer back",
        )
    scheduler = stable_diffusion_scheduler(config["sampling"]["sampler"], **checkpoint.read_metadata()["chain"])
    return stable_diffusion_pipeline(model, own, tokenizer, scheduler)


def stable_diffusion_pipeline(
    model: TextToImageModel, vae: AutoencoderKL, tokenizer: CLIPTokenizer, scheduler: SchedulerMixin
) -> StableDiffusionPipeline:
    """The pipeline of a model's own UNet and text encoder, silent and without a safety checker."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer_of(model: dict[str, Any]) -> str | os.PathLike:
    """Where the tokenizer of a run is, by the `model` section of its configuration."""
    if model["tokenizer"] is None and model["base"] is not None:
        return Path(model["base"]) / "tokenizer"
    name = model["tokenizer"] or next(iter(PACKAGED_TOKENIZERS))
    return PACKAGED_TOKENIZERS.get(name, name)


def token_length(model: TextToImageModel) -> int:
    """How many tokens its text encoder takes; as many as CLIP's if it has none."""
    return MAX_LENGTH if model.text_encoder is None else model.text_encoder.config.max_position_embeddings


def check_scaling(scaling: LatentScaling, name: str) -> None:
    """Raise :class:`InputError` for a normalisation of latents that StableDiffusionPipeline does not undo."""
    if scaling.shift_factor or scaling.latents_mean is not None:
        raise InputError(
            "it shifts latents, which diffusers' StableDiffusionPipeline does not undo",
            argument="data.vae",
            value=name,
            wanted="a VAE with a scaling_factor alone, as those of Stable Diffusion have",
        )


def draw_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str], *, seed: int, **options: Any) -> Tensor:
    """An image of each prompt, uint8 (N, 3, H, W) on the CPU; image i is a function of its prompt and (seed, i).

    Args:
        pipe: On the device to draw on.
        prompts: What they show.
        seed: Seed of their noise.
        options: Further arguments of the pipeline's call.
    """
    images = []
    for start in range(0, len(prompts), AT_ONCE):
        part = list(prompts[start : start + AT_ONCE])
        generators = [image_generator(seed, start + i) for i in range(len(part))]
        drawn = pipe(part, generator=generators, output_type="pt", **options).images
        images.append((drawn.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(images)


def draw_prompt_grid(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], path: Path, *, seed: int, **options: Any
) -> None:
    """Draw prompts as :func:`draw_prompts` into one PNG, each with its words; the file's folder is made."""
    images = draw_prompts(pipe, prompts, seed=seed, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, path, list(prompts))
