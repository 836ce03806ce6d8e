"""Train the small VAE of the digits: `python -m gspn_dit.training.digits_vae --out FOLDER`.

An AutoencoderKL, 4 times down to 8×8×4 latents, on the 4,500 training digits.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import trange

from gspn_dit.data.digits import IMAGE_SIZE, Digits
from gspn_dit.data.vae import decode, encode_moments, sample_posterior
from gspn_dit.errors import InputError
from gspn_dit.options import command, require


@dataclass
class Options:
    """How the digits VAE is trained.

    Args:
        out: Folder to write, in diffusers' layout; it must not exist yet.
        steps: Optimiser steps.
        batch_size: Images a step.
        learning_rate: Peak of AdamW's rate, which falls to 0 along a cosine.
        kl_weight: Weight of the posterior's KL divergence per latent value, against the error per pixel.
        latent_noise: Standard deviation of the noise, in units of the latents', that the decoder learns to see through.
        seed: Seed of the weights and every draw.
    """

    out: str
    steps: int = 3500
    batch_size: int = 32
    learning_rate: float = 2e-3
    kl_weight: float = 1e-3
    latent_noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key in ("kl_weight", "latent_noise"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")


def main(options: Options) -> None:
    """Train the digits VAE and print its reconstruction error on the held-out digits.

    The latents are made easy to diffuse: the KL term keeps them near a unit Gaussian, and the decoder is trained on
    noisy latents, so that what a diffusion model leaves unfinished still decodes to a clean digit.
    """
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out={options.out!r} exists already: choose another folder, or remove it first")
    torch.manual_seed(options.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )
    images = Digits("train").images
    train(vae, images, options)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=scaling_factor(vae, images))
    error = reconstruction_error(vae, Digits("test").images)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        vae.save_pretrained(Path(temporary) / "vae")
        os.replace(Path(temporary) / "vae", out)
    print(
        f"{out}: scaling factor {vae.config.scaling_factor:.4f}; 500 held-out digits, pixels in [0, 1]: "
        f"mean squared error {error:.6f}, PSNR {psnr(error):.2f} dB"
    )


def train(vae: AutoencoderKL, images: Tensor, options: Options) -> None:
    """Fit the VAE to images uint8 (N, 3, 32, 32), each drawn with a random shift of up to 2 pixels."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    bar = trange(options.steps, desc="digits VAE", unit="step")
    for _ in bar:
        chosen = torch.randint(len(images), (options.batch_size,))
        # The digits' border is 2 pixels of black, so a roll by 2 is a shift.
        down, right = torch.randint(-2, 3, (2,)).tolist()
        pixels = images[chosen].roll((down, right), dims=(2, 3)) / 127.5 - 1

        posterior = vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.std)
        latents = latents + options.latent_noise * latents.detach().std() * torch.randn_like(latents)
        decoded = vae.decode(latents).sample
        reconstruction = F.mse_loss(decoded, pixels) + 0.1 * F.l1_loss(decoded, pixels)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = reconstruction + options.kl_weight * kl

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(reconstruction=f"{reconstruction.item():.4f}", kl=f"{kl.item():.2f}", refresh=False)


def scaling_factor(vae: AutoencoderKL, images: Tensor) -> float:
    """1 / the standard deviation of sampled latents of the images: what brings them to unit variance."""
    moments = torch.cat([encode_moments(vae, batch) for batch in images.split(500)])
    mean, logvar = moments.chunk(2, dim=1)
    return 1 / math.sqrt(mean.var().item() + logvar.exp().mean().item())


def reconstruction_error(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean squared error per pixel, in [0, 1], of images decoded from the mean of their posterior."""
    errors = []
    for batch in images.split(500):
        moments = encode_moments(vae, batch)
        latents = sample_posterior(vae.config, moments, torch.zeros_like(moments[:, : moments.shape[1] // 2]))
        errors.append((decode(vae, latents).float() - batch.float()).square().mean() / 255**2)
    return torch.stack(errors).mean().item()


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]."""
    return -10 * math.log10(error)


if __name__ == "__main__":
    command(main, Options, prog="python -m gspn_dit.training.digits_vae")
