"""The clean latents of training samples: one call, whatever the source holds."""

from __future__ import annotations

from typing import Protocol

from diffusers import AutoencoderKL
from torch import Tensor

from gspn_dit.autoencoder import encode_moments, sample_posterior
from gspn_dit.autoencoder.vae import LatentScaling


class LatentEncoder(Protocol):
    """Makes clean latents of the samples of one kind of source."""

    def __call__(self, samples: dict[str, Tensor]) -> Tensor:
        """Normalised latents (B, C, h, w) of samples of the training stream, on their device."""
        ...


class FromMoments:
    """Latents of a store, drawn from the posterior whose mean and log-variance it holds.

    Args:
        scaling: The store's.
    """

    def __init__(self, scaling: LatentScaling) -> None:
        self.scaling = scaling

    def __call__(self, samples: dict[str, Tensor]) -> Tensor:
        return sample_posterior(self.scaling, samples["moments"], samples["posterior_noise"])


class FromImages:
    """Latents of images, drawn from the posterior that a VAE gives.

    Args:
        vae: On the device of the samples.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae

    def __call__(self, samples: dict[str, Tensor]) -> Tensor:
        moments = encode_moments(self.vae, samples["image"])
        return sample_posterior(self.vae.config, moments, samples["posterior_noise"])
