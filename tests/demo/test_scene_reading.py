"""Scenes are read as they were drawn, at any size and after the VAE; what a caption does not say is wrong."""

from collections import Counter

import pytest
import torch
from torch.nn.functional import interpolate, pad

from gspn_dit.autoencoder.vae import decode, encode_moments, load_vae, sample_posterior
from gspn_dit.demo.scene_reading import NO_COLOUR, Score, caption_accuracy, read_scenes, score
from gspn_dit.demo.scenes import COLOURS, Description, Scenes, Thing
from gspn_dit.errors import InputError
from gspn_dit.storage.packaged import PACKAGED_VAES

COUNT = 200
WRONG = Score(False, False, False, False, False, False)


@pytest.fixture(scope="module")
def held_out():
    """Scenes of the test split, uint8 (200, 3, 64, 64), and what they show."""
    scenes = Scenes("test")
    return torch.stack([scenes[i][0] for i in range(COUNT)]), [scenes.describe(i) for i in range(COUNT)]


@pytest.fixture(scope="module")
def found(held_out):
    return read_scenes(held_out[0])


def test_held_out_scenes_are_read_as_they_were_drawn(held_out, found):
    pictures, descriptions = held_out
    read = [score(things, description).all for things, description in zip(found, descriptions, strict=True)]
    assert sum(read) >= 0.98 * COUNT
    assert caption_accuracy(pictures[:50], list(map(str, descriptions[:50])))["all"] == sum(read[:50]) / 50
    assert caption_accuracy(pictures[:50], descriptions[:50])["count"] == 1


@pytest.mark.parametrize("scale", [2, 4])
def test_larger_pictures_are_read_with_digits_of_the_trained_size_and_with_larger_ones(held_out, scale):
    pictures, descriptions = held_out[0][:40], held_out[1][:40]
    larger = interpolate(pictures, scale_factor=scale, mode="bicubic")
    assert caption_accuracy(larger, descriptions)["all"] >= 0.95
    border = 64 * (scale - 1)
    assert caption_accuracy(pad(pictures, (border, 0, 0, border)), descriptions)["all"] >= 0.95


def test_the_scenes_vae_keeps_what_can_be_read(held_out, found):
    assert (PACKAGED_VAES["scenes"] / "diffusion_pytorch_model.safetensors").stat().st_size < 1e6
    vae = load_vae("scenes")
    latents = sample_posterior(vae.config, encode_moments(vae, held_out[0]), torch.zeros(COUNT, 4, 16, 16))
    decoded = read_scenes(decode(vae, latents))
    same = [_things(one) == _things(other) for one, other in zip(found, decoded, strict=True)]
    assert sum(same) >= 0.99 * COUNT


def _things(found):
    return Counter(one.thing for one in found)


def test_every_other_caption_is_wrong(held_out, found):
    """One digit, one colour, one relation or one thing changed: what was changed is said to be wrong."""
    for things, description in zip(found, held_out[1], strict=True):
        if not score(things, description).all:
            continue
        first, *others = description.things
        digit = Thing(first.colour, (first.digit + 1) % 10)
        assert _parts(score(things, Description((digit, *others), description.relations))) == _without(
            description, "digits", "bindings", "all"
        )
        colours = list(COLOURS)
        colour = Thing(colours[colours.index(first.colour) - 1], first.digit)
        assert _parts(score(things, Description((colour, *others), description.relations))) == _without(
            description, "colours", "bindings", "all"
        )


def _parts(result):
    """Which parts of a score are true; the places of things that are not the caption's are left out."""
    return {part for part in ("count", "digits", "colours", "bindings", "all") if getattr(result, part)}


def _without(description, *parts):
    return {"count", "digits", "colours", "bindings", "all"} - set(parts)


def test_a_thing_too_many_or_missing_is_wrong(held_out, found):
    for things, description in zip(found, held_out[1], strict=True):
        if len(description.things) > 1:
            fewer = Description(description.things[:-1], description.relations[:-1])
            assert score(things, fewer) == WRONG
            assert score(things[:-1], description) == WRONG
    assert score([], "a red 3") == WRONG


def test_places_and_bindings_that_are_not_the_captions_are_wrong(held_out, found):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    swapped = 0
    for things, description in zip(found, held_out[1], strict=True):
        distinct = len(set(description.things)) == len(description.things) > 1
        if not distinct or not score(things, description).all:
            continue
        first, *rest = description.relations
        turned = score(things, Description(description.things, (opposite[first], *rest)))
        assert turned.bindings and not turned.places and not turned.all
        one, other, *more = description.things
        if one.colour != other.colour and one.digit != other.digit:
            exchanged = (Thing(other.colour, one.digit), Thing(one.colour, other.digit), *more)
            result = score(things, Description(exchanged, description.relations))
            assert result.digits and result.colours and not result.bindings and not result.all
            swapped += 1
    assert swapped > 30


def test_specks_are_not_things_and_a_thing_of_two_colours_has_none(held_out, found):
    index = next(i for i, things in enumerate(found) if len(things) == 1)
    picture = held_out[0][index].clone()
    picture[:, 0, 0] = 255
    assert read_scenes([picture]) == [found[index]]
    (thing,) = found[index]
    middle = round(thing.place[1])
    picture[:, :middle] = picture[:, :middle].flip(0).roll(1, 0)
    two_coloured = read_scenes([picture])[0]
    assert len(two_coloured) >= 1 and not score(two_coloured, held_out[1][index]).all
    grey = held_out[0][index].amax(0, keepdim=True).expand(3, -1, -1)
    assert [one.thing.colour for one in read_scenes([grey])[0]] == [NO_COLOUR]


def test_an_empty_canvas_has_nothing():
    assert read_scenes(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)) == [[], []]


def test_what_cannot_be_scored_is_refused(held_out):
    with pytest.raises(InputError, match="picture="):
        read_scenes(torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match=r"captions=1: wanted one for each of 2 pictures"):
        caption_accuracy(held_out[0][:2], ["a red 3"])
    with pytest.raises(InputError, match="caption="):
        caption_accuracy(held_out[0][:1], ["three red lions"])
