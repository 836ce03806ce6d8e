"""Images to files: single PNGs, grids for the eye, and npz batches for evaluation."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Sequence

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


def load_image(path: str | os.PathLike) -> Tensor:
    """What :func:`save_image` wrote, uint8 (3, H, W)."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def save_grid(images: Tensor, path: str | os.PathLike) -> None:
    """Write images, uint8 (N, 3, H, W), as one PNG: a near-square grid in reading order with small white margins.

    Images under 64 pixels a side are shown enlarged, pixel by pixel.
    """
    scale = max(1, math.ceil(_SMALLEST / min(images.shape[2:])))
    images = interpolate(images.cpu().float(), scale_factor=scale, mode="nearest").to(torch.uint8)
    columns = math.ceil(math.sqrt(len(images)))
    save_image(make_grid(images, nrow=columns, padding=_MARGIN, pad_value=_PAPER), path)


def save_npz(
    images: Iterable[Tensor], labels: Sequence[int], image_size: tuple[int, int], path: str | os.PathLike
) -> None:
    """Write a batch as ADM's evaluation suite reads it, one image in memory at a time.

    `arr_0` holds the images, uint8 (N, H, W, 3), `arr_1` their labels, int64 (N,), and `labels` the same by name.

    Args:
        images: N of them, uint8 (3, H, W).
        labels: N class ids.
        image_size: (H, W).
        path: The file, which is not compressed.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *image_size, 3)}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for _, image in zip(labels, images, strict=True):
                file.write(image.permute(1, 2, 0).contiguous().numpy().data)
        for name in ("arr_1", "labels"):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.array(labels, dtype=np.int64), allow_pickle=False)
