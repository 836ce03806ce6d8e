"""Pictures to classify: of every source, with their classes, prepared as timm prepares them."""

import numpy as np
import pytest
import torch
from made.classifying import write_idx_folder
from made.images import write_images
from PIL import Image
from timm.data import create_transform

from gspn_dit.data.pictures import ArrayPictures, open_judged, open_training
from gspn_dit.data.preparation import Preparation, Prepared
from gspn_dit.errors import InputError


def image_folder(folder, classes=("cat", "dog"), **options):
    for name in classes:
        write_images(folder / name, **options)
    return folder


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_a_folder_with_both_splits(tmp_path, name):
    image_folder(tmp_path / "train", count=3)
    pixels = write_images(tmp_path / name / "cat", count=2)
    write_images(tmp_path / name / "dog", count=1)
    training, judged = open_training(str(tmp_path), 8)
    assert (len(training), len(judged)) == (6, 3)
    assert judged.class_names == ["cat", "dog"] and [judged.label(i) for i in range(3)] == [0, 0, 1]
    assert np.array_equal(np.array(judged.picture(1)), pixels[1])  # whole
    assert len(open_judged(str(tmp_path))) == len(open_judged(str(tmp_path / name))) == 3


def test_two_folders(tmp_path):
    train, val = image_folder(tmp_path / "a"), image_folder(tmp_path / "b", count=1)
    assert open_training(str(train), 8)[1] is None
    assert len(open_training(str(train), 8, validation=str(val))[1]) == 2
    image_folder(tmp_path / "b", classes=["newt"])
    with pytest.raises(InputError, match=r"^validation=.*its classes are not those of the training images \(newt\)"):
        open_training(str(train), 8, validation=str(val))


def test_idx_files_and_digits_are_in_memory(tmp_path):
    folder = str(write_idx_folder(tmp_path / "data"))
    training, judged = open_training(folder, 12, ["low", "middle", "high"])
    assert training.array.shape == (24, 1, 12, 12) and len(judged) == 10
    assert judged.class_names == ["low", "middle", "high"] and training.picture(0).mode == "L"
    assert open_training(folder, 12)[1].class_names == ["0", "1", "2"]
    digits, held_out = open_training("digits", 32)
    assert digits.array.shape == (4500, 3, 32, 32) and len(held_out) == 500
    for source in ("digits", str(image_folder(tmp_path / "images"))):
        with pytest.raises(InputError, match=r"^class_names: these data have names of their own"):
            open_training(source, 32, ["a"])


def test_photos_are_pictures_too():
    training, _ = open_training("photos", 64)
    assert training.picture(0).size == (64, 64) and 0 <= training.label(0) < 16


def test_a_picture_that_cannot_be_read_is_passed_over_with_a_warning(tmp_path):
    folder = image_folder(tmp_path / "data", count=2)
    (folder / "cat" / "0.png").write_bytes(b"no picture")
    images = Prepared(open_judged(str(folder)), Preparation(8, (0.5,) * 3, (0.5,) * 3))
    with pytest.warns(UserWarning, match=r"unreadable image, skipped: .*cat/0\.png"):
        batch, labels = images.__getitems__([0, 3])
    assert batch.shape == (2, 3, 8, 8) and labels.tolist() == [0, 1]


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (97, 64), (40, 200), (31, 30)])
@pytest.mark.parametrize(("side", "share"), [(32, 1.0), (32, 0.875), (31, 0.9), (64, 0.95)])
def test_a_picture_is_prepared_as_timm_does(size, side, share):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    for interpolation in ("bicubic", "bilinear", "nearest", "lanczos"):
        ours = Preparation(side, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), share, interpolation)
        theirs = create_transform(
            side, is_training=False, interpolation=interpolation, mean=ours.mean, std=ours.std, crop_pct=share
        )
        torch.testing.assert_close(ours(picture), theirs(picture), rtol=0, atol=1e-6)


def test_what_is_taken_as_it_is_is_what_a_picture_would_be():
    pixels = torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8)
    pictures = ArrayPictures(pixels, torch.arange(4), list("abcd"))
    preparation = Preparation(20, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=1.0)
    images, labels = Prepared(pictures, preparation).__getitems__([2, 1])
    expected = torch.stack([preparation(pictures.picture(i)) for i in (2, 1)])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert labels.tolist() == [2, 1]


def test_the_crop_keeps_its_share_of_the_shorter_side():
    """A picture of 64 by 32 pixels at 16: resized to 20 at crop_pct 0.8, of which the middle is kept."""
    picture = Image.new("RGB", (64, 32))
    picture.paste((255, 255, 255), (0, 0, 64, 3))  # the uppermost tenth, which the crop leaves out
    whole, cropped = (
        Preparation(16, (0.0,) * 3, (1.0,) * 3, crop_pct=share, interpolation="nearest")(picture)
        for share in (1.0, 0.8)
    )
    assert whole.shape == cropped.shape == (3, 16, 16)
    assert whole[:, 0].min() == 1 and cropped.max() == 0


def test_what_is_given_takes_the_place_of_the_models():
    own = Preparation.of(
        {"input_size": (3, 224, 224), "mean": (0.1,), "std": (0.2,), "crop_pct": 0.9, "interpolation": "bicubic"}
    )
    assert own == Preparation(224, (0.1,), (0.2,), 0.9, "bicubic")
    assert own.changed(None, None, None) == own
    assert own.changed(384, 1.0, "bilinear") == Preparation(384, (0.1,), (0.2,), 1.0, "bilinear")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_all_pictures(tmp_path, processes):
    images = Prepared(open_judged(str(write_idx_folder(tmp_path / "d"))), Preparation(12, (0.5,), (0.5,), 1.0))
    shares = [images.shares(4, rank, processes) for rank in range(processes)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(10))
    assert max(len(batch) for share in shares for batch in share) <= 4
