"""Images to files: single PNGs, and grids for the eye."""

from __future__ import annotations

import math
import os

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from gspn_dit.files import replacing

_SMALLEST = 64  # pixels a side in a grid, below which images are enlarged by a whole factor
_MARGIN, _PAPER = 4, 255


def save_image(image: Tensor, path: str | os.PathLike) -> None:
    """Write an image, uint8 (3, H, W), as PNG."""
    with replacing(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(temporary, format="PNG")


def save_grid(images: Tensor, path: str | os.PathLike) -> None:
    """Write images, uint8 (N, 3, H, W), as one PNG: a near-square grid in reading order with small white margins.

    Images under 64 pixels a side are shown enlarged, pixel by pixel.
    """
    scale = max(1, math.ceil(_SMALLEST / min(images.shape[2:])))
    images = interpolate(images.cpu().float(), scale_factor=scale, mode="nearest").to(torch.uint8)
    columns = math.ceil(math.sqrt(len(images)))
    save_image(make_grid(images, nrow=columns, padding=_MARGIN, pad_value=_PAPER), path)
