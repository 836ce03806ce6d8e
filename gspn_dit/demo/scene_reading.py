"""Reads pictures of scenes back: which digits stand where in which colours, and whether a caption says so.

Nothing is learned but the packaged classifier of digits. What is not black falls into connected parts; parts of one
colour that are close for their size are one thing. A thing's colour is the named one of the hue that most of its ink is
nearest to, its digit is what the classifier says of its cut-out, its place is the middle of the box around it. So a
picture may be of any size, and its digits larger or smaller than those of the training scenes.
"""

from __future__ import annotations

import colorsys
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations, permutations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gspn_dit.demo.classifier import DigitsClassifier
from gspn_dit.demo.scenes import COLOURS, RELATIONS, Description, Thing, parse_caption
from gspn_dit.errors import InputError
from gspn_dit.extras import require_extras
from gspn_dit.storage.packaged import PACKAGED_CLASSIFIERS

INK = 0.35  # of white, in its brightest channel: a pixel above this is not canvas
CLOSE = 0.18  # of the larger part's longer side: parts of one colour no farther apart than this are one thing
SPECK = 0.08  # of the largest thing's ink: less than this is dirt, not a thing
MOST = 0.7  # of a thing's ink: a smaller share than this of any one colour, and the thing has none
PALE = 0.25  # saturation below which ink has no hue
WRITTEN = 22  # pixels of the longer side of a digit as the classifier knows it
NO_COLOUR = "mixed"  # no caption names it
_SIDE = DigitsClassifier.image_size


@dataclass(frozen=True)
class Found:
    """A thing in a picture.

    Attributes:
        thing: Its colour, which is :data:`NO_COLOUR` where it is not of one colour, and its digit.
        place: Middle of the box around its ink, (x, y) in pixels, y down.
        size: Longer side of that box in pixels.
    """

    thing: Thing
    place: tuple[float, float]
    size: int


@dataclass(frozen=True)
class Score:
    """What of a caption is true of a picture; a thing too many or one missing makes everything wrong.

    Attributes:
        count: There are as many things as the caption names.
        digits: The digits are the caption's.
        colours: The colours are the caption's.
        bindings: The things are the caption's: each digit is in its own colour.
        places: The things stand to one another as the caption says. Where some are not the caption's, those that are
            must, and the others in some order.
        all: Things and places are the caption's.
    """

    count: bool
    digits: bool
    colours: bool
    bindings: bool
    places: bool
    all: bool


def read_scenes(pictures: Iterable[Tensor]) -> list[list[Found]]:
    """What is in pictures: for each, its things in no order.

    Args:
        pictures: uint8 RGB pictures (3, H, W), a batch (B, 3, H, W) or any number of them, of any sizes.

    Raises:
        InputError: If a picture is of another kind, or the demo extra is not installed.
    """
    require_extras("demo")
    pictured = [_things(picture) for picture in pictures]
    cut_outs = [cut_out for things in pictured for _, cut_out in things]
    digits = iter(_classify(torch.stack(cut_outs)).tolist() if cut_outs else ())
    return [[_found(part, next(digits)) for part, _ in things] for things in pictured]


def score(found: Sequence[Found], caption: str | Description) -> Score:
    """What of a caption is true of the things found in a picture.

    Raises:
        InputError: If the caption is not of the scenes' grammar.
    """
    description = parse_caption(caption) if isinstance(caption, str) else caption
    if len(found) != len(description.things):
        return Score(False, False, False, False, False, False)
    there, named = [one.thing for one in found], description.things
    digits = Counter(thing.digit for thing in there) == Counter(thing.digit for thing in named)
    colours = Counter(thing.colour for thing in there) == Counter(thing.colour for thing in named)
    bindings = Counter(there) == Counter(named)
    orders = [(_agreement(order, named), _stand(order, description.relations)) for order in permutations(found)]
    places = max(orders)[1]  # True is more than False: of the orders that agree best, one in which the places are right
    return Score(True, digits, colours, bindings, places, bindings and places)


def caption_accuracy(pictures: Iterable[Tensor], captions: Sequence[str | Description]) -> dict[str, float]:
    """Shares of pictures, from 0 to 1, of which each part of a :class:`Score` is true.

    Args:
        pictures: As :func:`read_scenes` takes them.
        captions: As many captions.

    Raises:
        InputError: If there are not as many captions as pictures, or none, or one is not of the grammar.
    """
    found = read_scenes(pictures)
    if not found or len(found) != len(captions):
        raise InputError(argument="captions", value=len(captions), wanted=f"one for each of {len(found)} pictures")
    scores = [asdict(score(things, caption)) for things, caption in zip(found, captions, strict=True)]
    return {part: sum(one[part] for one in scores) / len(scores) for part in scores[0]}


def _found(part: _Part, digit: int) -> Found:
    left, top, right, bottom = part.box.tolist()
    return Found(Thing(part.colour, digit), ((left + right) / 2, (top + bottom) / 2), part.size)


def _agreement(order: Sequence[Found], named: Sequence[Thing]) -> int:
    """How many digits and colours of things in this order are those named."""
    pairs = [(one.thing, thing) for one, thing in zip(order, named, strict=True)]
    return sum((one.colour == thing.colour) + (one.digit == thing.digit) for one, thing in pairs)


def _stand(order: Sequence[Found], relations: Sequence[str]) -> bool:
    """Whether the first stands so to each of the others: on that side, and farther along that axis than across it."""
    first = np.array(order[0].place)
    for other, relation in zip(order[1:], relations, strict=True):
        direction = np.array(RELATIONS[relation])
        offset = first - other.place
        along, across = offset @ direction, np.abs(offset[direction == 0]).item()
        if along <= across:
            return False
    return True


@cache
def _classifier() -> DigitsClassifier:
    return DigitsClassifier.load(PACKAGED_CLASSIFIERS["digits"])


@torch.inference_mode()
def _classify(cut_outs: Tensor) -> Tensor:
    """Digits (N,) of cut-outs (N, 32, 32) in [0, 1]."""
    images = (255 * cut_outs).round().to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1)
    return torch.cat([_classifier()(batch).argmax(dim=1) for batch in images.split(256)])


@dataclass(frozen=True)
class _Part:
    """A connected part of a picture's ink, or several.

    Attributes:
        labels: Their numbers.
        colour: Its name.
        box: Left, top, right and bottom, (4,).
        ink: Pixels.
    """

    labels: list[int]
    colour: str
    box: np.ndarray
    ink: int

    @property
    def size(self) -> int:
        return int((self.box[2:] - self.box[:2]).max())

    def distance(self, other: _Part) -> int:
        """Pixels between the boxes along the axis where they are farther apart; 0 where they meet."""
        return max(0, *(other.box[:2] - self.box[2:]).tolist(), *(self.box[:2] - other.box[2:]).tolist())

    def __add__(self, other: _Part) -> _Part:
        box = np.concatenate([np.minimum(self.box, other.box)[:2], np.maximum(self.box, other.box)[2:]])
        return _Part(self.labels + other.labels, self.colour, box, self.ink + other.ink)


def _things(picture: Tensor) -> list[tuple[_Part, Tensor]]:
    """The things in a uint8 picture (3, H, W), each with its cut-out (32, 32) in [0, 1]."""
    from skimage.measure import label

    if picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) != 3:
        raise InputError(
            argument="picture", value=f"{picture.dtype} {tuple(picture.shape)}", wanted="uint8 RGB (3, H, W)"
        )
    pixels = picture.permute(1, 2, 0).numpy().astype(np.float32) / 255
    brightness = pixels.max(axis=2)
    labels, count = label(brightness > INK, connectivity=2, return_num=True)
    parts = []
    for number in range(1, count + 1):
        rows, columns = np.nonzero(labels == number)
        box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        parts.append(_Part([number], _colour(pixels[rows, columns]), box, len(rows)))
    things = _joined(parts)
    most = max((thing.ink for thing in things), default=0)
    return [
        (thing, _cut_out(brightness * np.isin(labels, [0, *thing.labels]), thing))
        for thing in things
        if thing.ink >= SPECK * most
    ]


def _colour(pixels: np.ndarray) -> str:
    """The name of the colour that most pixels (N, 3) in [0, 1] are nearest to by their hue, of those that have one."""
    highest, lowest = pixels.max(axis=1), pixels.min(axis=1)
    chroma = highest - lowest
    red, green, blue = ((pixels - lowest[:, None]) / np.maximum(chroma, 1e-6)[:, None]).T
    hues = np.select([red >= 1, green >= 1], [green - blue, 2 + blue - red], 4 + red - green) / 6
    away = np.abs(hues[:, None] - _named_hues())
    nearest = np.minimum(away % 1, -away % 1).argmin(axis=1)[chroma > PALE * highest]
    votes = np.bincount(nearest, minlength=len(COLOURS))
    return list(COLOURS)[votes.argmax()] if votes.max() >= MOST * len(pixels) else NO_COLOUR


@cache
def _named_hues() -> np.ndarray:
    """Hues (colours,) from 0 to 1."""
    return np.array([colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))[0] for colour in COLOURS.values()])


def _joined(parts: list[_Part]) -> list[_Part]:
    """The parts with those of one colour that are close to each other made one, until there are none."""
    for first, second in combinations(parts, 2):
        if first.colour == second.colour and first.distance(second) <= CLOSE * max(first.size, second.size):
            rest = [part for part in parts if part is not first and part is not second]
            return _joined([*rest, first + second])
    return parts


def _cut_out(brightness: np.ndarray, thing: _Part) -> Tensor:
    """A thing as the classifier knows digits: of their size, centred by its ink (32, 32)."""
    left, top, right, bottom = thing.box.tolist()
    border = 1 + thing.size // 10  # the soft edge of the ink is outside the box
    shown = np.pad(brightness, border)[top : bottom + 2 * border, left : right + 2 * border]
    shown = np.minimum(shown / np.quantile(shown[shown > INK], 0.9), 1)
    rows, columns = np.indices(shown.shape)
    y, x = (((axis + 0.5) * shown).sum() / shown.sum() for axis in (rows, columns))
    half = _SIDE / 2 * thing.size / WRITTEN
    around = math.ceil(2 * half)
    window = (around + x - half, around + y - half, around + x + half, around + y + half)
    resized = Image.fromarray(np.pad(shown, around)).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box=window)
    return torch.from_numpy(np.array(resized)).clamp(0, 1)
