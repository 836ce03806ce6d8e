"""Scenes show what their captions say, the same at every call; what must not be in training is not in it."""

import numpy as np
import pytest
import torch

from gspn_dit.data import open_images
from gspn_dit.data.captions import CaptionedImages, open_captioned
from gspn_dit.demo.digits import Digits
from gspn_dit.demo.scene_reading import read_scenes, score
from gspn_dit.demo.scenes import (
    COLOURS,
    GAP,
    HELD_OUT,
    MARGIN,
    RELATIONS,
    Description,
    Scenes,
    Thing,
    contrary,
    parse_caption,
)
from gspn_dit.errors import InputError

COUNT = 300


@pytest.fixture(scope="module", params=["train", "test"])
def scenes(request):
    return Scenes(request.param)


def test_they_are_a_captioned_source_by_name():
    scenes = open_captioned("scenes", 64, split="test", seed=3)
    assert isinstance(scenes, CaptionedImages) and isinstance(open_images("scenes", 64), Scenes)
    image, label = scenes[5]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
    assert scenes.class_names[label].split()[0] == ["one", "two", "three"][scenes.caption(5).count(" a ")]


def test_a_scene_depends_on_seed_split_and_index_alone(scenes):
    again, other = Scenes(scenes.split), Scenes(scenes.split, seed=1)
    for i in (len(scenes) - 1, 7, 0):
        assert torch.equal(scenes[i][0], again[i][0]) and scenes.caption(i) == again.caption(i)
    assert [scenes.caption(i) for i in range(20)] != [other.caption(i) for i in range(20)]
    assert len({scenes.caption(i) for i in range(100)}) > 60


def test_every_test_caption_has_a_combination_that_no_training_caption_has():
    def combinations(split, i):
        return {(thing.colour, thing.digit) for thing in Scenes(split).describe(i).things}

    seen = set().union(*(combinations("train", i) for i in range(2000)))
    assert not seen & HELD_OUT and len(seen) == 60 - len(HELD_OUT)
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert all(combinations("test", i) & HELD_OUT for i in range(COUNT))
    assert set().union(*(combinations("test", i) for i in range(COUNT))) >= HELD_OUT


def test_one_two_and_three_digits_are_as_frequent_and_all_relations_come(scenes):
    described = [scenes.describe(i) for i in range(COUNT)]
    counts = np.bincount([len(one.things) for one in described], minlength=4)[1:]
    assert counts.min() > COUNT / 3 - 40
    assert {relation for one in described for relation in one.relations} == set(RELATIONS)
    for one in described:
        assert len({RELATIONS[relation][0] == 0 for relation in one.relations}) == len(one.relations) < 3


def test_scenes_are_written_with_the_digits_of_their_split(scenes):
    """A scene of one digit, cut to its ink, is the ink of one of the split's digits in its colour."""
    digits = Digits(scenes.split)
    singles = [i for i in range(60) if len(scenes.describe(i).things) == 1][:10]
    for i in singles:
        (thing,) = scenes.describe(i).things
        image = scenes[i][0].float().amax(0) / max(COLOURS[thing.colour])
        candidates = digits.images[digits.labels == thing.digit][:, 0].float() / 255
        assert min(_difference(image, candidate) for candidate in candidates) < 0.03


def _difference(one, other):
    """The largest difference of two pictures cut to their ink, at the level at which they agree best."""
    return min(_cut_and_compared(one, other, level) for level in (0.3, 0.5, 0.7))


def _cut_and_compared(one, other, level):
    first, second = _cut(one, level), _cut(other, level)
    return (first - second).abs().max().item() if first.shape == second.shape else 1.0


def _cut(image, level):
    rows, columns = (torch.nonzero((image > level).any(axis))[:, 0] for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def test_digits_keep_apart_and_off_the_edge():
    """Digits of several colours, told apart by colour: the gap is free of ink along one axis or the other."""
    scenes, checked = Scenes("train"), 0
    for i in range(COUNT):
        things, image = scenes.describe(i).things, scenes[i][0].numpy()
        assert image[:, :MARGIN].max() == image[:, -MARGIN:].max() == image[:, :, :MARGIN].max() == 0
        colours = {thing.colour for thing in things}
        if len(things) < 2 or len(colours) < len(things):
            continue
        boxes = []
        for colour in colours:
            value = np.array(COLOURS[colour])[:, None, None] / 255
            strength = image.max(0) / value.max() / 255
            own = (np.abs(image / 255 - value * strength).max(0) < 0.01) & (strength > 0.4)
            rows, columns = (np.flatnonzero(own.any(axis)) for axis in (1, 0))
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        for k, first in enumerate(boxes):
            for second in boxes[:k]:
                apart = [max(second[a] - first[a + 2], first[a] - second[a + 2]) for a in (0, 1)]
                assert max(apart) >= GAP
        checked += 1
    assert checked > 50


@pytest.mark.parametrize(
    ("caption", "things", "relations"),
    [
        ("a red 3", [("red", 3)], []),
        ("A red 3 left of a blue 7", [("red", 3), ("blue", 7)], ["left of"]),
        (
            "a pink 0 below a cyan 0 and right of a pink 0",
            [("pink", 0), ("cyan", 0), ("pink", 0)],
            ["below", "right of"],
        ),
    ],
)
def test_captions_are_read_and_written(caption, things, relations):
    description = Description(tuple(Thing(*thing) for thing in things), tuple(relations))
    assert parse_caption(caption) == description
    assert str(description) == caption.lower()


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a purple 3",
        "a red 12",
        "a red 3 under a blue 7",
        "a red 3 and a blue 7",
        "a red 3 left of a blue 7 and right of a green 1",
        "a red 3 above a blue 7 and left of a green 1 and below a red 2",
    ],
)
def test_other_captions_are_refused(caption):
    with pytest.raises(InputError, match="caption="):
        parse_caption(caption)


def test_a_caption_is_read_as_it_was_drawn(scenes):
    assert all(parse_caption(scenes.caption(i)) == scenes.describe(i) for i in range(100))


def test_a_contrary_caption_is_not_true_of_the_picture(scenes):
    draw, count = np.random.default_rng(0), 60
    others = [contrary(scenes.describe(i), draw) for i in range(count)]
    found = read_scenes(scenes[i][0] for i in range(count))
    assert not any(score(things, other).all for things, other in zip(found, others, strict=True))
    for i, other in enumerate(others):
        own = scenes.describe(i)
        assert len(other.things) == len(own.things) and parse_caption(str(other)) == other
        held_out = [any((thing.colour, thing.digit) in HELD_OUT for thing in each.things) for each in (other, own)]
        assert held_out[1] or not held_out[0]


def test_every_kind_of_contrary_caption_is_made():
    own = parse_caption("a red 3 left of a blue 8")
    draw = np.random.default_rng(0)
    found = {str(contrary(own, draw)) for _ in range(200)}
    assert {"a red 3 right of a blue 8", "a blue 8 left of a red 3", "a blue 3 left of a red 8"} <= found
    assert {"a red 4 left of a blue 8", "a green 3 left of a blue 8"} <= found


@pytest.mark.parametrize(("options", "said"), [({"split": "val"}, "split="), ({"image_size": 32}, "64 pixels a side")])
def test_other_splits_and_sizes_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        Scenes(**options)
