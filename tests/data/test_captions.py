"""Pictures with captions, from folders and tables."""

import json
import warnings

import pytest
import torch
from made.captions import CAPTIONS, write_captioned, write_tokenizer

from gspn_dit.commands import EncodeOptions
from gspn_dit.data.captions import (
    TokenizedCaptions,
    check_mirrored,
    open_captioned,
    some_captions,
    warn_of_long_captions,
)
from gspn_dit.data.encode import open_encoded
from gspn_dit.data.image_folder import ImageFolder
from gspn_dit.errors import InputError
from gspn_dit.text import load_tokenizer


@pytest.mark.parametrize("how", ["txt", "jsonl"])
def test_each_picture_has_its_caption(tmp_path, how):
    images = open_captioned(write_captioned(tmp_path, how=how), 16)
    assert [images.caption(i) for i in range(len(images))] == list(CAPTIONS)
    assert images.class_names == ["image"] and images[2][1] == 0


def test_pictures_are_cropped_as_those_of_classes(tmp_path):
    write_captioned(tmp_path / "class", size=(40, 24))
    of_classes = ImageFolder(tmp_path, 16)
    captioned = open_captioned(tmp_path, 16)
    assert all(torch.equal(captioned[i][0], of_classes[i][0]) for i in range(3))


def test_a_table_may_lie_anywhere_and_name_a_picture_twice(tmp_path):
    write_captioned(tmp_path / "pictures")
    rows = [("pictures/1.png", "one"), ("pictures/0.png", "zero"), ("pictures/1.png", "  another\none ")]
    table = tmp_path / "train.jsonl"
    table.write_text("\n".join(json.dumps({"file_name": file, "text": text}) for file, text in rows) + "\n\n")
    images = open_captioned(table, 16)
    assert [images.caption(i) for i in range(3)] == ["one", "zero", "another one"]
    assert torch.equal(images[0][0], images[2][0])


def test_pictures_that_a_table_leaves_out_are_said(tmp_path):
    write_captioned(tmp_path, how="jsonl")
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.warns(UserWarning, match=r"1 pictures are not in metadata.jsonl and left out, such as .*2\.png"):
        assert len(open_captioned(tmp_path, 16)) == 2


def test_missing_and_empty_captions_are_named(tmp_path):
    write_captioned(tmp_path)
    (tmp_path / "1.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"the caption of 1 pictures is empty: .*1\.png"):
        open_captioned(tmp_path, 16)
    (tmp_path / "1.txt").unlink()
    with pytest.raises(InputError, match=r"1 of 3 pictures have no caption: .*1\.png; put NAME\.txt"):
        open_captioned(tmp_path, 16)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is no JSON"),
        ("[]", "has no file_name"),
        ('{"file_name": "0.png"}', "has no text"),
        ('{"file_name": "0.png", "text": 3}', "has no text"),
        ('{"file_name": "0.png", "text": " "}', "is empty"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, problem):
    write_captioned(tmp_path, how="jsonl")
    with open(tmp_path / "metadata.jsonl", "a") as table:
        table.write("\n" + line)
    with pytest.raises(InputError, match=r"line 5 of .*metadata\.jsonl") as error:
        open_captioned(tmp_path, 16)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_a_table_of_pictures_that_are_not_there_is_refused(tmp_path):
    write_captioned(tmp_path, how="jsonl")
    (tmp_path / "0.png").unlink()
    with pytest.raises(InputError, match=r"1 of the pictures .* are not there: .*0\.png"):
        open_captioned(tmp_path, 16)


def test_what_has_no_captions_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        open_captioned(tmp_path / "none", 16)
    with pytest.raises(InputError, match="no pictures"):
        open_captioned(tmp_path, 16)
    with pytest.raises(InputError, match="have no captions"):
        open_captioned("digits", 32)
    with pytest.raises(InputError, match="one split"):
        open_captioned(write_captioned(tmp_path), 16, split="test")


def test_samples_hold_the_tokens_of_the_picture_that_could_be_read(tmp_path):
    write_captioned(tmp_path / "pictures")
    (tmp_path / "pictures" / "0.png").write_bytes(b"no picture")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"), 12)
    source = TokenizedCaptions(open_captioned(tmp_path / "pictures", 16), tokenizer)
    with pytest.warns(UserWarning, match="unreadable image 1, skipped"):
        sample = source.sample(0)
    assert sample["input_ids"].shape == (12,)
    assert all(torch.equal(sample[name], source.sample(1)[name]) for name in ("image", "input_ids"))
    assert torch.equal(source.sample(1, flip=True)["image"], sample["image"].flip(-1))


def test_captions_to_judge_all_by_are_spread_over_the_images():
    assert some_captions(str, 3) == ["0", "1", "2"]
    many = list(map(int, some_captions(str, 10_000)))
    assert len(many) == len(set(many)) <= 1000 and many[0] == 0 and many[-1] > 9_900


def test_how_many_captions_are_cut_is_said_with_the_remedy(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path), 8)
    said = r"^2 of 4 captions looked at are cut to 8 tokens, such as 'a a a a a a a' of 9; shorten them$"
    with pytest.warns(UserWarning, match=said):
        warn_of_long_captions(["a red", "a a a a a a a", "a " * 40, "a"], tokenizer, "shorten them")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_long_captions(["a a a a a a"], tokenizer, "shorten them")


def test_scenes_are_not_mirrored_beside_their_captions():
    with pytest.raises(InputError, match=r"^horizontal_flip=True: mirrored images of scenes are .*; give false$"):
        check_mirrored("scenes", ["a red 3"])
    asked = {"tokenizer": "scenes", "horizontal_flip": True}
    with pytest.raises(InputError, match="horizontal_flip=True: mirrored images of scenes"):
        open_encoded(EncodeOptions("scenes", "scenes", 64, "out", tokens=18, **asked))


def test_captions_that_say_left_or_right_are_named_where_images_are_mirrored(tmp_path):
    said = "^2 of 3 captions looked at say left or right, such as 'the LEFT one', which is not true of a mirrored"
    with pytest.warns(UserWarning, match=said) as warned:
        check_mirrored("emoji", ["bright leftovers", "the LEFT one", "right of it"])
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_mirrored("somewhere", ["bright leftovers"])
    given = {"tokenizer": str(write_tokenizer(tmp_path / "tokenizer")), "horizontal_flip": True}
    with pytest.warns(UserWarning, match="^1 of 3 captions looked at say left or right"):
        open_encoded(EncodeOptions(str(write_captioned(tmp_path / "data")), "digits", 32, "out", tokens=16, **given))


def test_an_unfinished_store_is_named_as_one(tmp_path):
    (tmp_path / "encode.json").write_text('{"data": "scenes"}')
    with pytest.raises(InputError, match=r"unfinished latent store; to finish .* --data scenes"):
        open_captioned(tmp_path, 64)


def test_tokens_without_what_makes_them_are_refused():
    given = {"data": "scenes", "vae": "scenes", "image_size": 64, "out": "store", "tokens": 18}
    with pytest.raises(InputError, match="tokens=18: wanted a tokenizer or a text_encoder"):
        EncodeOptions(**given)
    assert EncodeOptions(**given, tokenizer="scenes").tokens == 18
