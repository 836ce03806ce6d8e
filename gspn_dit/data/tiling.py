"""Large images decoded in tiles, so that the VAE's activations are a tile's and not the image's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import AutoencoderKL

from gspn_dit.data.vae import downsampling

TILE_PIXELS = 512
OVERLAP = 0.25
_STATE = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")


@contextmanager
def tiled_decoding(vae: AutoencoderKL, height: int, width: int) -> Iterator[None]:
    """In the block, the VAE decodes latents of height × width through diffusers' tiling, if it does not already.

    Neighbouring tiles of up to TILE_PIXELS a side are blended over a quarter of it. A tile's group norms see the tile
    alone, so that an image is nearly, not exactly, the one that is decoded whole.
    """
    before = {name: getattr(vae, name) for name in _STATE}
    try:
        if not vae.use_tiling:  # else with the sizes that whoever enabled it chose
            vae.enable_tiling()
            # diffusers' own sizes come from the config's sample_size, which for a VAE of small images is tiny.
            vae.tile_latent_min_size = tile_side(height, width, TILE_PIXELS // downsampling(vae))
            vae.tile_sample_min_size = vae.tile_latent_min_size * downsampling(vae)
            vae.tile_overlap_factor = OVERLAP
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def tile_side(height: int, width: int, most: int) -> int:
    """Side in latents of the tiles of a height × width map: a multiple of 4, from about 3/4 of `most` up to it.

    diffusers lays a tile every 3/4 of the side for as long as there is map left, and the last may be a sliver, with
    norms of its own. This is the side whose last row and column of tiles are widest.
    """

    def last(side: int) -> float:
        step = side * 3 // 4
        return min((length - 1) % step + 1 for length in (height, width)) / step

    sides = range(max(most // 4, 1) * 4, max(most * 3 // 16, 1) * 4 - 1, -4)
    return max(sides, key=last)
