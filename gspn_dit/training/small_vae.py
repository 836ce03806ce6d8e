"""Train a small packaged VAE: `python -m gspn_dit.training.small_vae --data photos --out FOLDER`.

AutoencoderKLs of 4 latent channels at a quarter of the image's side, without attention; the photographs' is for images
of any size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from gspn_dit.data.digits import IMAGE_SIZE, Digits
from gspn_dit.data.photos import Photos
from gspn_dit.data.vae import decode, encode_moments, sample_posterior
from gspn_dit.files import new_folder, require_new
from gspn_dit.options import command, require
from gspn_dit.progress import figure, progress
from gspn_dit.training.linear_start import start_linear

BATCH_SIZE = 100


class DigitShifts:
    """The 4,500 training digits, a batch drawn with a random shift of up to 2 pixels."""

    block_out_channels, sample_size, autocast, linear = (8, 16, 48), IMAGE_SIZE, False, False

    def __init__(self) -> None:
        self.images = Digits("train").images

    def batch(self, count: int) -> Tensor:
        """Random training images uint8 (count, 3, 32, 32)."""
        chosen = torch.randint(len(self.images), (count,))
        # The digits' border is 2 pixels of black, so a roll by 2 is a shift.
        down, right = torch.randint(-2, 3, (2,)).tolist()
        return self.images[chosen].roll((down, right), dims=(2, 3))

    def held_out(self) -> Iterator[tuple[str, Tensor]]:
        """Sets of images uint8 (N, 3, H, W) that training does not see, and what they are."""
        yield "500 held-out digits", Digits("test").images


class PhotoCrops:
    """Square crops of the photographs at 64 or 128 pixels, half of them mirrored, from twice enlarged to the whole."""

    # sample_size is the side of the tiles that diffusers' tiled decoding takes.
    block_out_channels, sample_size, autocast, linear = (16, 32, 64), 512, True, True

    def __init__(self) -> None:
        self.photographs = Photos().photographs

    @cached_property
    def images(self) -> Tensor:
        """Training images that stand for all, uint8 (480, 3, 128, 128)."""
        return _stacked(Photos(image_size=128), 480)

    def batch(self, count: int) -> Tensor:
        """Random crops uint8, with equal chance (count, 3, 64, 64) or, of as many pixels, (count // 4, 3, 128, 128)."""
        side, count = (64, count) if torch.rand(()) < 0.5 else (128, max(count // 4, 1))
        return torch.stack([self._crop(side) for _ in range(count)])

    def held_out(self) -> Iterator[tuple[str, Tensor]]:
        """Sets of images uint8 (N, 3, H, W) that training does not see, and what they are."""
        for side, count in ((64, 480), (128, 160), (256, 48)):
            yield f"{count} held-out crops at {side} px", _stacked(Photos("test", side), count)

    def _crop(self, side: int) -> Tensor:
        photograph = self.photographs[int(torch.randint(len(self.photographs), ()))]
        scale, x, y, mirror = torch.rand(4).tolist()
        smallest = side / 2
        length = smallest * (min(photograph.size) / smallest) ** scale
        left, top = x * (photograph.width - length), y * (photograph.height - length)
        box = (left, top, left + length, top + length)
        crop = torch.from_numpy(
            np.array(photograph.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=2))
        )
        return (crop.flip(1) if mirror < 0.5 else crop).permute(2, 0, 1)


SOURCES = {"digits": DigitShifts, "photos": PhotoCrops}
RECIPES = {
    "digits": {"steps": 3500, "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 0},
    "photos": {"steps": 3600, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 100},
}


def _stacked(images: Photos, count: int) -> Tensor:
    """The first images, uint8 (count, 3, H, W)."""
    return torch.stack([images[i][0] for i in range(count)])


@dataclass
class Options:
    """How a packaged VAE is trained; what is null comes from the recipe of its data.

    Args:
        data: What it is for: `digits` or `photos`.
        out: Folder to write, in diffusers' layout; it must not exist yet.
        steps: Optimiser steps.
        batch_size: Images a step.
        learning_rate: Peak of AdamW's rate, which falls to 0 along a cosine.
        warmup_steps: Steps over which the rate rises first.
        kl_weight: Weight of the posterior's KL divergence per latent value, against the error per pixel.
        latent_noise: Standard deviation of the noise, in units of the latents', that the decoder learns to see through.
        seed: Seed of the weights and every draw.
    """

    data: Literal["digits", "photos"]
    out: str
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    kl_weight: float = 1e-3
    latent_noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for key, value in RECIPES[self.data].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        for key in ("steps", "batch_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key in ("warmup_steps", "kl_weight", "latent_noise"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")


def main(options: Options) -> None:
    """Train the VAE of a data set and print its reconstruction error on images it did not see.

    The latents are made easy to diffuse: the KL term keeps them near a unit Gaussian, and the decoder is trained on
    noisy latents, so that what a diffusion model leaves unfinished still decodes to a clean image.
    """
    out = Path(options.out)
    require_new(out)
    torch.manual_seed(options.seed)
    source = SOURCES[options.data]()
    vae = new_vae(source)
    train(vae, source, options)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=scaling_factor(vae, source.images))
    errors = [(name, reconstruction_error(vae, images)) for name, images in source.held_out()]
    with new_folder(out) as folder:
        vae.save_pretrained(folder)
    print(f"{out}: scaling factor {vae.config.scaling_factor:.4f}")
    for name, error in errors:
        print(f"{name}, pixels in [0, 1]: mean squared error {error:.6f}, PSNR {psnr(error):.2f} dB")


def new_vae(source: DigitShifts | PhotoCrops) -> AutoencoderKL:
    """A VAE for a data set that has learned nothing yet."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=source.block_out_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=source.sample_size,
    )
    if source.linear:
        start_linear(vae)
    return vae


def train(vae: AutoencoderKL, source: DigitShifts | PhotoCrops, options: Options) -> None:
    """Fit the VAE to batches of the source."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    if options.warmup_steps:
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / options.warmup_steps, total_iters=options.warmup_steps)
        schedule = torch.optim.lr_scheduler.ChainedScheduler([rise, schedule])
    bar = progress(range(options.steps), desc=f"{options.data} VAE", unit="step")
    for _ in bar:
        pixels = source.batch(options.batch_size) / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=source.autocast):
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * torch.randn_like(posterior.std)
            latents = latents + options.latent_noise * latents.detach().std() * torch.randn_like(latents)
            decoded = vae.decode(latents).sample.float()
        reconstruction = F.mse_loss(decoded, pixels) + 0.1 * F.l1_loss(decoded, pixels)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction + options.kl_weight * kl

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown = f"reconstruction {figure(reconstruction.item())}, kl {figure(kl.item())}"
        bar.set_postfix_str(shown, refresh=False)


def scaling_factor(vae: AutoencoderKL, images: Tensor) -> float:
    """1 / the standard deviation of sampled latents of the images: what brings them to unit variance."""
    moments = torch.cat([encode_moments(vae, batch) for batch in images.split(BATCH_SIZE)])
    mean, logvar = moments.chunk(2, dim=1)
    return 1 / math.sqrt(mean.var().item() + logvar.exp().mean().item())


def reconstruction_error(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean squared error per pixel, in [0, 1], of images decoded from the mean of their posterior."""
    errors = []
    for batch in images.split(BATCH_SIZE):
        moments = encode_moments(vae, batch)
        latents = sample_posterior(vae.config, moments, torch.zeros_like(moments[:, : moments.shape[1] // 2]))
        errors.append((decode(vae, latents).float() - batch.float()).square().mean() / 255**2)
    return torch.stack(errors).mean().item()


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]."""
    return -10 * math.log10(error)


if __name__ == "__main__":
    command(main, Options, prog="python -m gspn_dit.training.small_vae")
