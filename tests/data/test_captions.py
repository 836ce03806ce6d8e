"""Pictures with captions, from folders and tables."""

import json

import pytest
import torch
from made.captions import CAPTIONS, write_captioned, write_tokenizer

from gspn_dit.commands import EncodeOptions
from gspn_dit.data.captions import TokenizedCaptions, open_captioned
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


def test_an_unfinished_store_is_named_as_one(tmp_path):
    (tmp_path / "encode.json").write_text('{"data": "scenes"}')
    with pytest.raises(InputError, match=r"unfinished latent store; to finish .* --data scenes"):
        open_captioned(tmp_path, 64)


def test_tokens_without_what_makes_them_are_refused():
    given = {"data": "scenes", "vae": "scenes", "image_size": 64, "out": "store", "tokens": 18}
    with pytest.raises(InputError, match="tokens=18: wanted a tokenizer or a text_encoder"):
        EncodeOptions(**given)
    assert EncodeOptions(**given, tokenizer="scenes").tokens == 18
