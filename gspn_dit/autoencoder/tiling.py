"""Large images decoded and encoded in tiles, so that the VAE's activations are a tile's and not the image's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from gspn_dit.autoencoder.vae import decode, downsampling, encode_moments

TILE_PIXELS = 512
OVERLAP = 0.25
_BLOCK = 8  # latents
_TILING = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")

NormMoments = dict[nn.GroupNorm, tuple[Tensor, Tensor]]


def decode_in_tiles(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """As :func:`~gspn_dit.autoencoder.vae.decode`, through diffusers' tiling.

    Tiles have up to TILE_PIXELS a side, are blended over a quarter of it, and share group norms.

    A tile whose norms saw that tile alone would have a brightness and contrast of its own. So the norms' mean and
    variance come first, from a mosaic: blocks taken evenly from all over the map, of a tile's size together.
    The image is nearly, not exactly, the one that is decoded whole. Where a VAE's tiling is already enabled it is left
    as it is, norms and all.
    """
    if vae.use_tiling:
        return decode(vae, latents)
    factor, (height, width) = downsampling(vae), latents.shape[2:]
    norms = _norm_moments(vae.decoder, partial(decode, vae, mosaic(latents, TILE_PIXELS // factor)))
    with _tiles(vae, tile_side(height, width, TILE_PIXELS // factor), factor), _fixed_norms(norms):
        return decode(vae, latents)


def encode_in_tiles(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """As :func:`~gspn_dit.autoencoder.vae.encode_moments`, in tiles that share group norms as when decoding.

    The moments are nearly, not exactly, those of the image that is encoded whole.

    Args:
        vae: Any; where its tiling is already enabled it is left as it is.
        images: uint8 (B, 3, H, W), on any device; H and W are multiples of the VAE's factor.
    """
    if vae.use_tiling:
        return encode_moments(vae, images)
    factor = downsampling(vae)
    height, width = (side // factor for side in images.shape[2:])
    norms = _norm_moments(vae.encoder, partial(encode_moments, vae, mosaic(images, TILE_PIXELS // factor, factor)))
    with _tiles(vae, tile_side(height, width, TILE_PIXELS // factor), factor), _fixed_norms(norms):
        return encode_moments(vae, images)


def tile_side(height: int, width: int, most: int) -> int:
    """Side in latents of the tiles of a height × width map: a multiple of 4, from about 3/4 of `most` up to it.

    diffusers lays a tile every 3/4 of the side for as long as there is map left, and the last may be a sliver. This is
    the side whose last row and column of tiles are widest.
    """

    def last(side: int) -> float:
        step = side * 3 // 4
        return min((length - 1) % step + 1 for length in (height, width)) / step

    return max(range(max(most // 4, 1) * 4, max(most * 3 // 16, 1) * 4 - 1, -4), key=last)


def mosaic(map: Tensor, side: int, scale: int = 1) -> Tensor:
    """Square blocks taken evenly from all over a map (B, C, h, w), put together to a square of that side or smaller.

    Args:
        map: Latents, or an image.
        side: In latents.
        scale: How many of the map's places a side stand for one latent: 1, or the VAE's factor for an image.
    """
    for axis in (2, 3):
        length = map.shape[axis] // scale
        block = min(_BLOCK, length)
        starts = torch.linspace(0, length - block, min(side, length) // block or 1).round().long() * scale
        places = (starts[:, None] + torch.arange(block * scale)).flatten()
        map = map.index_select(axis, places.to(map.device))
    return map


def _norm_moments(network: nn.Module, run: Callable[[], object]) -> NormMoments:
    """Mean and variance (B, groups) that a network's group norms find in their inputs as it runs."""
    found: NormMoments = {}

    def keep(norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> None:
        groups = inputs[0].float().unflatten(1, (norm.num_groups, -1)).flatten(2)
        variance, mean = torch.var_mean(groups, dim=2, correction=0)
        found[norm] = mean, variance

    with _hooked((module for module in network.modules() if isinstance(module, nn.GroupNorm)), keep):
        run()
    return found


@contextmanager
def _fixed_norms(moments: NormMoments) -> Iterator[None]:
    """In the block, group norms take these means and variances for those of their input."""

    def normalise(norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs
        mean, variance = (value.repeat_interleave(norm.num_channels // norm.num_groups, 1) for value in moments[norm])
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        scale, shift = (value.to(x.dtype).view(*value.shape, *[1] * (x.ndim - 2)) for value in (scale, shift))
        return torch.addcmul(shift, x, scale)

    with _hooked(moments, normalise):
        yield


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    """In the block, the hook follows every forward of the modules."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _tiles(vae: AutoencoderKL, side: int, factor: int) -> Iterator[None]:
    """In the block, the VAE decodes and encodes in tiles of so many latents a side.

    diffusers' own sizes come from the config's sample_size, which for a VAE of small images is tiny.
    """
    before = {name: getattr(vae, name) for name in _TILING}
    try:
        for name, value in zip(_TILING, (True, side * factor, side, OVERLAP), strict=True):
            setattr(vae, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
