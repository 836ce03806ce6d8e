"""Images to files: single PNGs, grids for the eye, and npz batches for evaluation."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable

import numpy as np
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


def load_image(path: str | os.PathLike) -> np.ndarray:
    """What :func:`save_image` wrote, uint8 (H, W, 3)."""
    with Image.open(path) as image:
        return np.array(image)


def save_grid(images: Tensor, path: str | os.PathLike) -> None:
    """Write images, uint8 (N, 3, H, W), as one PNG: a near-square grid in reading order with small white margins.

    Images under 64 pixels a side are shown enlarged, pixel by pixel.
    """
    scale = max(1, math.ceil(_SMALLEST / min(images.shape[2:])))
    images = images.cpu()
    if scale > 1:
        images = interpolate(images.float(), scale_factor=scale, mode="nearest").to(torch.uint8)
    columns = math.ceil(math.sqrt(len(images)))
    save_image(make_grid(images, nrow=columns, padding=_MARGIN, pad_value=_PAPER), path)


def save_npz(
    batches: Iterable[np.ndarray], shape: tuple[int, ...], path: str | os.PathLike, **arrays: np.ndarray
) -> None:
    """Write images as ADM's evaluation suite reads them, one batch in memory at a time, and arrays beside them.

    The same contents give the same file.

    Args:
        batches: The images, uint8 (n, H, W, 3) each; they become `arr_0`, which is not compressed.
        shape: (N, H, W, 3) of all of them.
        path: The file.
        arrays: What else goes in, by name.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for batch in batches:
                member.write(np.ascontiguousarray(batch).data)
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
