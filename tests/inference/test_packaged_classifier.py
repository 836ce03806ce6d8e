"""The packaged classifier of clothes: small, right about test pictures at several sizes, and asked without options."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

from gspn_dit.commands import run
from gspn_dit.inference.image_classifier import ImageClassifier
from gspn_dit.storage.packaged import PACKAGED_IMAGE_CLASSIFIERS

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "clothes.py"
SIDE, ASKED_WELL = 28, 85  # of a hundred pictures, of which nine in ten are expected


@pytest.fixture(scope="module")
def classifier():
    return ImageClassifier.load("fashion")


@pytest.fixture(scope="module")
def pictures():
    """A hundred test pictures, ten of each class."""
    return runpy.run_path(str(FIGURE))["pictures"]()


def right(classifier, pictures):
    answers = classifier(pictures).argmax(1).tolist()
    return sum(answer == number // 10 for number, answer in enumerate(answers))


def test_it_is_right_about_test_pictures(classifier, pictures):
    assert len(pictures) == 100 and {picture.size for picture in pictures} == {(SIDE, SIDE)}
    assert right(classifier, pictures) >= ASKED_WELL


def test_a_picture_of_another_size_and_mode_is_the_same_picture(classifier, pictures):
    larger = [picture.convert("RGB").resize((112, 112), Image.Resampling.BICUBIC) for picture in pictures]
    assert right(classifier, larger) >= ASKED_WELL


def test_it_is_small_and_knows_its_classes(classifier):
    folder = PACKAGED_IMAGE_CLASSIFIERS["fashion"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    assert classifier.class_names[:2] == ["T-shirt/top", "Trouser"] and len(classifier.class_names) == 10


def test_classify_needs_no_options(pictures, tmp_path, capsys):
    pictures[19].save(tmp_path / "trouser.png")
    run("classify", argv=[str(tmp_path / "trouser.png")])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'trouser.png'}: Trouser ")


def test_the_figure_of_clothes_is_drawn(tmp_path):
    runpy.run_path(str(FIGURE))["main"](tmp_path / "clothes.png")
    assert (tmp_path / "clothes.png").stat().st_size > 10_000
