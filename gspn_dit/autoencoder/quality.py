"""What latents of a VAE are worth for given images: their mean and spread, and how well they give the images back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from gspn_dit.autoencoder.vae import LatentScaling, channels, decode, encode_moments, normalisation, sample_posterior
from gspn_dit.errors import warn

PLAUSIBLE_STD, PLAUSIBLE_MEAN = (0.5, 2.0), 1.0  # of normalised latents, which a diffusion model expects at 1 and 0
LOW_PSNR = 20.0  # dB, of reconstructions that no longer show the image


def latent_statistics(scaling: LatentScaling, moments: Iterable[Tensor]) -> dict[str, Any]:
    """Mean and standard deviation of normalised latents, over all and by channel, of batches of moments; for JSON."""
    images = 0
    total = squares = torch.zeros((), dtype=torch.float64)
    for batch in moments:
        latents = sample_posterior(scaling, batch.double(), batch.new_zeros(()))
        variance = batch.double().chunk(2, dim=-3)[1].exp()
        gain = scaling.scaling_factor / (1.0 if scaling.latents_std is None else channels(scaling, latents)[1])
        images += len(batch)
        total = total + latents.mean(dim=(2, 3)).sum(dim=0)
        squares = squares + (latents.square() + variance * gain**2).mean(dim=(2, 3)).sum(dim=0)
    mean, square = total / images, squares / images  # (C,)
    return {
        "images": images,
        "mean": _rounded(mean.mean()),
        "std": _rounded((square.mean() - mean.mean() ** 2).sqrt()),
        "channel_means": [_rounded(each) for each in mean],
        "channel_stds": [_rounded(each) for each in (square - mean**2).sqrt()],
    }


def warn_of_latents(statistics: dict[str, Any], scaling: LatentScaling) -> None:
    """Warn of normalised latents that no diffusion model expects, and of what may have made them so."""
    mean, std = statistics["mean"], statistics["std"]
    if not (PLAUSIBLE_STD[0] <= std <= PLAUSIBLE_STD[1] and abs(mean) <= PLAUSIBLE_MEAN):
        given = ", ".join(f"{key} {value}" for key, value in normalisation(scaling).items() if value is not None)
        warn(
            f"latents of these images have mean {mean:g} and standard deviation {std:g}, where a diffusion model "
            f"expects about 0 and 1: see to the VAE's config.json ({given})"
        )


class Images(Protocol):
    """Images with labels by index: (uint8 (3, H, W), label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


def some_images(images: Images, most: int) -> Iterator[Tensor]:
    """A few images spread over a dataset, uint8 (1, 3, H, W) each; in an unreadable one's place the next."""
    count = min(most, len(images))
    yield from (images[k * len(images) // count][0][None] for k in range(count))


def reconstruction_error(vae: AutoencoderKL, images: Iterable[Tensor]) -> float:
    """Mean squared error per pixel, in [0, 1], of images decoded from the mean of their posterior.

    Args:
        images: Batches uint8 (n, 3, H, W).
    """
    errors = []
    for batch in images:
        batch = batch.to(vae.device)
        moments = encode_moments(vae, batch)
        latents = sample_posterior(vae.config, moments, torch.zeros_like(moments[:, : moments.shape[1] // 2]))
        errors.append((decode(vae, latents).float() - batch.float()).square().mean() / 255**2)
    return torch.stack(errors).mean().item()


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]; at most 100."""
    return -10 * math.log10(max(error, 1e-10))


def warn_of_psnr(decibels: float) -> None:
    """Warn of reconstructions that do not show the image: no model of such latents can draw it."""
    if decibels < LOW_PSNR:
        warn(
            f"this VAE gives these images back at {decibels:.1f} dB (PSNR), and latents of it cannot show them; take "
            "another, or train one: `gspn-dit small-vae --data FOLDER --image-size N --out VAE`"
        )


def _rounded(value: Tensor) -> float:
    """To what a sum in another order leaves alone."""
    return float(f"{value.item():.4g}")
