"""Images to files: single PNGs, grids for the eye, and npz batches for evaluation."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from torch.nn.functional import interpolate

from gspn_dit.storage.files import replacing

_SMALLEST = 64  # pixels a side in a grid, below which images are enlarged by a whole factor
_ROOM = 128  # pixels that images are enlarged to at most for the sake of their captions
_MARGIN, _PAPER, _TEXT = 4, 255, 11


def save_image(image: Tensor, path: str | os.PathLike) -> None:
    """Write an image, uint8 (3, H, W), as PNG."""
    with replacing(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(temporary, format="PNG")


def load_image(path: str | os.PathLike) -> np.ndarray:
    """What :func:`save_image` wrote, uint8 (H, W, 3), of whatever size: Image.open takes 179 million pixels at most."""
    with PngImageFile(path) as image:
        return np.array(image)


def save_grid(images: Tensor, path: str | os.PathLike, captions: Sequence[str] | None = None) -> None:
    """Write images, uint8 (N, 3, H, W), as one PNG: a near-square grid in reading order with small white margins.

    Images under 64 pixels a side are shown enlarged, pixel by pixel; under up to 128 where captions want the room.

    Args:
        images: The images.
        path: The file.
        captions: What is written over each, and cut where it is wider than the image.
    """
    import matplotlib

    # It brings a font with the letters of most alphabets; Pillow's own has English ones alone.
    font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _TEXT)
    captions = [" ".join(caption.split()) for caption in captions or []]
    widest = max(map(font.getlength, captions), default=0)
    scale = max(1, math.ceil(_SMALLEST / min(images.shape[2:])), math.ceil(min(widest, _ROOM) / images.shape[3]))
    images = images.cpu()
    if scale > 1:
        images = interpolate(images.float(), scale_factor=scale, mode="nearest").to(torch.uint8)
    height, width = images.shape[2:]
    line = _TEXT + _MARGIN if captions else 0
    columns = math.ceil(math.sqrt(len(images)))
    rows, row_height, column_width = math.ceil(len(images) / columns), height + line + _MARGIN, width + _MARGIN
    edge = _MARGIN if len(images) > 1 else 0  # an image alone has no margin
    size = (columns * column_width - _MARGIN + 2 * edge, rows * row_height - _MARGIN + 2 * edge)
    picture = Image.new("RGB", size, (_PAPER, _PAPER, _PAPER))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture.paste(tile, (edge + column * column_width, edge + row * row_height + line))
    pen = ImageDraw.Draw(picture)
    for i, caption in enumerate(captions):
        row, column = divmod(i, columns)
        place = (_MARGIN + column * column_width, _MARGIN + row * row_height)
        pen.text(place, _cut(caption, font, width), fill=(0, 0, 0), font=font)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text if it is no wider than so many pixels, else as much of its beginning as is, with … at its end."""
    if font.getlength(text) <= width:
        return text
    return next((text[:n] + "…" for n in range(len(text), 0, -1) if font.getlength(text[:n] + "…") <= width), "")


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
