"""The packaged emoji: each picture has its name, and none is in both splits."""

import pytest
import torch

from gspn_dit.data.captions import open_captioned
from gspn_dit.demo.emoji import NAMES, PICTURES, Emoji, draw_sheet, read_names
from gspn_dit.errors import InputError

COLOURS = ("red", "green", "blue", "yellow", "purple")


def test_the_names_are_split_and_the_splits_have_nothing_in_common():
    train, test = open_captioned("emoji", 64), open_captioned("emoji", 64, split="test")
    assert len(test) == 100 and len(train) + len(test) == len(read_names()) > 1300
    assert not set(train.names) & set(test.names)
    assert [test.caption(i) for i in range(100)] == test.names == Emoji("test", seed=5).names
    assert all(name and "_" not in name and ":" not in name for name in train.names)


def test_pictures_are_what_their_names_say():
    """By colour, where a name has one: the strongest channel of three circles, the weakest of two more."""
    emoji = {name: images[i][0] for images in (Emoji(), Emoji("test")) for i, name in enumerate(images.names)}
    middles = {name: emoji[f"{name} circle"][:, 28:36, 28:36].float().mean((1, 2)) for name in COLOURS}
    assert [int(middles[name].argmax()) for name in ("red", "green", "blue")] == [0, 1, 2]
    assert [int(middles[name].argmin()) for name in ("yellow", "purple")] == [2, 1]
    assert all(emoji[f"{name} circle"][:, 0, 0].tolist() == [255, 255, 255] for name in COLOURS)


def test_no_two_pictures_are_the_same_and_none_is_empty():
    train = Emoji()
    pictures = torch.stack([train[i][0] for i in range(len(train))])
    assert pictures.shape[1:] == (3, 64, 64) and pictures.dtype == torch.uint8
    assert (pictures.flatten(1).float().std(1) > 3).all()
    assert len(pictures.flatten(1).unique(dim=0)) > 0.98 * len(pictures)


def test_they_ship_small_with_their_licences():
    assert PICTURES.stat().st_size + NAMES.stat().st_size < 5e6
    licences = PICTURES.with_suffix(".LICENSE").read_text()
    assert "SIL OPEN FONT LICENSE Version 1.1" in licences and "New BSD License" in licences


def test_the_names_are_those_of_the_package_they_came_from():
    package = pytest.importorskip("emoji")
    for character, name in read_names():
        entry = package.EMOJI_DATA.get(character + "\ufe0f") or package.EMOJI_DATA[character]
        assert entry["en"].strip(":").replace("_", " ") == name


def test_a_font_without_an_emoji_is_refused(tmp_path):
    with pytest.raises(OSError, match="cannot open resource"):
        draw_sheet(str(tmp_path / "none.ttf"), ["☂"])


@pytest.mark.parametrize(("options", "said"), [({"split": "val"}, "split="), ({"image_size": 32}, "64 pixels a side")])
def test_other_splits_and_sizes_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        Emoji(**options)
