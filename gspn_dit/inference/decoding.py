"""Latents to images in the form that a caller asks for, and back, with no more in memory at once than there is room."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from gspn_dit.autoencoder import decode, downsampling, encode_moments, sample_posterior
from gspn_dit.autoencoder.tiling import decode_in_tiles, encode_in_tiles

_PIXELS_A_DECODE = 2**20  # together; an image of more is decoded in tiles


def decode_images(vae: AutoencoderKL, latents: Tensor, output_type: str) -> Any:
    """Images of latents (B, C, h, w), a few at a time: the VAE's activations are far larger than the transformer's.

    Args:
        vae: On the latents' device.
        latents: Scaled, as the model gives them.
        output_type: `uint8` (B, 3, H, W); `pt` float (B, 3, H, W) or `np` float (B, H, W, 3), in [0, 1]; `pil`.
    """
    pixels = latents.shape[2] * latents.shape[3] * downsampling(vae) ** 2
    slices = latents.split(max(1, _PIXELS_A_DECODE // pixels))
    decoded = decode_in_tiles if pixels > _PIXELS_A_DECODE else decode
    images = torch.cat([decoded(vae, each) for each in slices])
    if output_type == "uint8":
        return images
    if output_type == "pt":
        return images.float().div_(255)
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    return arrays / np.float32(255) if output_type == "np" else [Image.fromarray(array) for array in arrays]


def encode_image(vae: AutoencoderKL, image: Tensor) -> Tensor:
    """Latents (1, C, h, w) of an image, uint8 (3, H, W): the posterior's mean, scaled; of a large one in tiles."""
    encoded = encode_in_tiles if image.shape[1] * image.shape[2] > _PIXELS_A_DECODE else encode_moments
    moments = encoded(vae, image[None])
    return sample_posterior(vae.config, moments, torch.zeros_like(moments[:, ::2]))
