"""Images to latents and back, through any diffusers AutoencoderKL."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor

from gspn_dit.errors import InputError
from gspn_dit.weights import PACKAGED, packaged


class LatentScaling(Protocol):
    """What brings latents to unit variance: `vae.config`, or a :class:`~gspn_dit.data.latents.LatentStore`."""

    scaling_factor: float
    shift_factor: float | None


def load_vae(name_or_folder: str | os.PathLike) -> AutoencoderKL:
    """An AutoencoderKL in float32, in eval mode, without gradients.

    Args:
        name_or_folder: `digits` or `photos` (the packaged ones), a local diffusers folder, or a hub name.

    Raises:
        InputError: If there is no such VAE, it cannot be fetched, or the folder holds something else.
    """
    name = str(name_or_folder)
    source = packaged(name) / "vae" if name in PACKAGED else Path(name_or_folder)
    remedy = (
        "give `digits`, `photos`, a folder with an AutoencoderKL's config.json and weights, or a hub name that can be "
        "reached"
    )
    if source.is_dir():
        _check_folder(source, remedy)
    elif source.is_absolute() or len(source.parts) > 2 or name.startswith("."):
        raise InputError(f"vae={name!r}: no such folder; {remedy}")
    try:
        vae = AutoencoderKL.from_pretrained(str(source), torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"vae={name!r}: {reason}; {remedy}") from error
    return vae.eval().requires_grad_(False)


def downsampling(vae: AutoencoderKL) -> int:
    """How many pixels a side one latent stands for: 8 for Stable Diffusion's VAEs, 4 for the packaged ones."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The posterior of images: its mean and log-variance, stacked on the channel axis.

    Args:
        images: uint8 (B, 3, H, W), on any device.

    Returns:
        float32 (B, 2C, H/f, W/f) on the VAE's device, not yet shifted or scaled.
    """
    pixels = images.to(vae.device, vae.dtype) / 127.5 - 1
    posterior = vae.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1).float()


def sample_posterior(scaling: LatentScaling, moments: Tensor, noise: Tensor) -> Tensor:
    """Normalised latents (mean + std·noise - shift)·scale, about unit variance: what the diffusion model learns.

    Args:
        scaling: `vae.config` or a latent store.
        moments: (…, 2C, h, w) from :func:`encode_moments` or a store.
        noise: (…, C, h, w) standard normal; zeros give the posterior's mean.
    """
    mean, logvar = moments.chunk(2, dim=-3)
    latents = mean + torch.exp(0.5 * logvar) * noise
    return (latents - (scaling.shift_factor or 0.0)) * scaling.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images uint8 (B, 3, H, W) of normalised latents (B, C, h, w): undoes :func:`sample_posterior` and decodes."""
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pixels = vae.decode(latents).sample.float()
    return pixels.add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)  # in place: a large image is large


def _check_folder(folder: Path, remedy: str) -> None:
    """diffusers would build a VAE of defaults from another model's config: refuse it here."""
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError) as error:
        raise InputError(f"vae={str(folder)!r}: no readable config.json there; {remedy}") from error
    if kind != "AutoencoderKL":
        raise InputError(f"vae={str(folder)!r}: config.json is of {kind!r}; {remedy}")
