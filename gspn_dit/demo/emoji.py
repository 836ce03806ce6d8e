"""Captioned emoji: some 1,400 pictures of 64×64 pixels with their English names, which come with the package.

The pictures are one WebP, without loss, beside a table of code points and names. It was drawn by

    draw_sheet("NotoColorEmoji.ttf", [character for character, _ in read_names()]).save(
        "emoji.webp", lossless=True, quality=100, method=6
    )

The font is Noto Color Emoji 2.042, of Debian's fonts-noto-color-emoji. The names are those that PyPI's emoji 2.16 gives
to fully qualified emoji of a single code point; the font lacks 23 of them, which are left out. emoji.LICENSE has the
licences of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gspn_dit.data.captions import CaptionedImages
from gspn_dit.data.images import check_split
from gspn_dit.errors import InputError

IMAGE_SIZE = 64
HELD_OUT = 100
PICTURES = Path(__file__).with_name("pictures") / "emoji.webp"
NAMES = PICTURES.with_suffix(".tsv")
_SPLIT_SEED = 20250112  # part of the data's definition
_COLUMNS = 40  # pictures in a row of the WebP
_FONT_SIZE = 109  # pixels: the only size of a font of bitmaps
_GLYPH = (136, 128)  # pixels of its bitmaps


class Emoji(CaptionedImages):
    """Emoji on white with their names as captions, such as "face with tongue" or "three o’clock".

    Args:
        split: `train`, or `test`: 100 others, the same ones always.
        image_size: 64, the only size there is.
        seed: Not used: nothing about them is random. Every named source is called with it.

    Attributes:
        only_size: That size.
        characters: The emoji themselves, a code point each.
        names: Their names.

    Raises:
        InputError: If the split is unknown or the size is not 64.
    """

    only_size = IMAGE_SIZE

    def __init__(self, split: str = "train", image_size: int = IMAGE_SIZE, seed: int = 0) -> None:
        check_split(split)
        if image_size != IMAGE_SIZE:
            raise InputError(
                f"the emoji are {IMAGE_SIZE} pixels a side",
                argument="image_size",
                value=image_size,
                remedy=f"give {IMAGE_SIZE}",
            )
        super().__init__(["emoji"], image_size)
        table = read_names()
        order = np.random.Generator(np.random.PCG64(_SPLIT_SEED)).permutation(len(table))
        self._chosen = np.sort(order[:HELD_OUT] if split == "test" else order[HELD_OUT:]).tolist()
        self.characters, self.names = ([table[i][k] for i in self._chosen] for k in (0, 1))

    def __len__(self) -> int:
        return len(self._chosen)

    def caption(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> tuple[Tensor, int]:
        row, column = divmod(self._chosen[index], _COLUMNS)
        top, left = row * IMAGE_SIZE, column * IMAGE_SIZE
        picture = _pictures()[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        return picture.permute(2, 0, 1).contiguous(), 0


@cache
def read_names() -> list[tuple[str, str]]:
    """Every emoji's character and name, in the order of the pictures."""
    rows = [line.split("\t") for line in NAMES.read_text(encoding="utf-8").splitlines()]
    return [(chr(int(code, 16)), name) for code, name in rows]


@cache
def _pictures() -> Tensor:
    """All pictures in rows of 40, uint8 (H, W, 3)."""
    with Image.open(PICTURES) as sheet:
        return torch.from_numpy(np.array(sheet.convert("RGB")))


def draw_sheet(font: str, characters: Sequence[str]) -> Image.Image:
    """Pictures of characters on white, in rows of 40. Raises :class:`InputError` for a font that lacks one."""
    drawn_by = ImageFont.truetype(font, _FONT_SIZE)
    rows = -(-len(characters) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * IMAGE_SIZE, rows * IMAGE_SIZE), "white")
    side = max(_GLYPH)
    for i, character in enumerate(characters):
        picture = Image.new("RGB", (side, side), "white")
        corner = ((side - _GLYPH[0]) // 2, (side - _GLYPH[1]) // 2)
        ImageDraw.Draw(picture).text(corner, character, font=drawn_by, embedded_color=True)
        if picture.getextrema() == ((255, 255),) * 3:
            raise InputError(argument="font", value=font, wanted=f"one that has {character!a}")
        row, column = divmod(i, _COLUMNS)
        small = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
        sheet.paste(small, (column * IMAGE_SIZE, row * IMAGE_SIZE))
    return sheet
