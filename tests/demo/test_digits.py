"""The packaged digits classifier, its training, and the digits evaluation as a user runs it."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch_fidelity
from PIL import Image
from safetensors.torch import save_file

from gspn_dit.commands import ClassifierOptions as TrainingOptions
from gspn_dit.commands import EvaluateOptions as Options
from gspn_dit.data import open_images
from gspn_dit.demo.classifier import DigitsClassifier, accuracy, train
from gspn_dit.demo.classifier import main as train_classifier
from gspn_dit.errors import InputError
from gspn_dit.evaluation.classifiers import CLASSIFIERS
from gspn_dit.evaluation.evaluate import evaluate, main
from gspn_dit.evaluation.extractors import create_extractor
from gspn_dit.evaluation.image_sets import open_samples
from gspn_dit.options import command
from gspn_dit.storage.packaged import PACKAGED_CLASSIFIERS

WEIGHTS = PACKAGED_CLASSIFIERS["digits"]


def digits(split, count):
    """Every n-th image of a split, uint8 (count, 3, 32, 32), and the labels."""
    dataset = open_images("digits", 32, split=split)
    images, labels = zip(*(dataset[i] for i in range(0, len(dataset), len(dataset) // count)), strict=True)
    return torch.stack(images)[:count], torch.tensor(labels)[:count]


@pytest.fixture(scope="module")
def held_out():
    return digits("test", 500)


def test_it_recognises_the_digits_it_never_saw(held_out):
    assert WEIGHTS.stat().st_size < 1e6
    assert accuracy(DigitsClassifier.load(WEIGHTS), *held_out) >= 0.97


@pytest.mark.parametrize("shift", [(2, 0), (-2, 1), (0, -2)])
def test_it_forgives_what_generated_digits_differ_in(held_out, shift):
    images, labels = held_out
    moved = images.roll(shift, dims=(2, 3)).float()
    soft = torch.nn.functional.avg_pool2d(moved, 3, stride=1, padding=1)
    noise = 10 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(0))
    altered = (0.8 * moved.lerp(soft, 0.7) + noise).clamp(0, 255).to(torch.uint8)
    assert accuracy(DigitsClassifier.load(WEIGHTS), altered, labels) >= 0.95


@pytest.mark.slow
def test_training_learns_and_is_the_same_for_the_same_seed(held_out):
    images, labels = digits("train", 900)
    first = train(DigitsClassifier, images, labels, seed=1, epochs=5)
    assert accuracy(first, *held_out) > 0.6
    torch.manual_seed(123)  # the state of the caller's generator is not its business
    again, other = (train(DigitsClassifier, images[:128], labels[:128], seed=seed, epochs=1) for seed in (1, 2))
    once_more = train(DigitsClassifier, images[:128], labels[:128], seed=1, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), once_more.parameters(), strict=True))
    assert not torch.equal(again.classify.weight, other.classify.weight)


@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_a_classifiers_classes_are_its_datas(name):
    kind = CLASSIFIERS.load(name)
    assert kind.data == name
    assert list(kind.class_names) == open_images(kind.data, kind.image_size, split="test").class_names


def test_a_place_that_cannot_be_written_is_refused_before_the_training(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"out=.*no folder that can be written to"):
        train_classifier(TrainingOptions(data="digits", out=str(tmp_path / "file" / "weights.safetensors")))


def test_other_weights_are_refused(tmp_path):
    (tmp_path / "noise.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match=r"noise.safetensors': not a readable safetensors file"):
        DigitsClassifier.load(tmp_path / "noise.safetensors")
    save_file({"classify.weight": torch.zeros(10, 64)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other.safetensors': not the digits classifier"):
        DigitsClassifier.load(tmp_path / "other.safetensors")


def write_samples(folder, images, labels):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    rows = [f"{i:03}.png,{label}" for i, label in enumerate(labels.tolist())]
    (folder / "labels.csv").write_text("\n".join(["file,label", *rows]) + "\n")
    return folder


@pytest.mark.slow
def test_the_command_scores_held_out_digits_as_near_and_recognised(held_out, tmp_path):
    images, labels = held_out
    options = {"reference": "digits", "features": "digits", "out": str(tmp_path / "new" / "metrics.json")}
    samples = write_samples(tmp_path / "samples", images, labels)
    arguments = [f"--{key}={value}" for key, value in {"samples": samples, **options}.items()]
    command(main, Options, prog="fid/evaluate.py", argv=arguments)
    metrics = json.loads(Path(options["out"]).read_text())
    assert metrics["class_accuracy"] >= 0.97
    assert (metrics["num_samples"], metrics["num_reference"]) == (500, 4500)
    assert (metrics["reference"], metrics["features"]) == ("digits", "digits")
    assert 9 < metrics["classifier_score"] <= 10  # ten classes: 10 if evenly spread and always certain
    assert 8 < metrics["classifier_score_torch_fidelity"] <= 10
    assert metrics["classifier_score_splits"] == 1 and "classifier_score_std" not in metrics
    assert "5000" in metrics["classifier_score_convention"]
    assert not [key for key in metrics if "inception" in key]
    assert metrics["precision"] > 0.7 and metrics["recall"] > 0.5
    assert metrics["weights_sha256"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()

    # Digits upside down keep their strokes but are other digits: farther away, and not recognised.
    main(Options(samples=str(write_samples(tmp_path / "flipped", images.flip(2), labels)), **options))
    flipped = json.loads(Path(options["out"]).read_text())
    assert flipped["fd"] > 5 * metrics["fd"]
    assert flipped["class_accuracy"] < 0.7
    assert flipped["precision"] < metrics["precision"]


def test_the_figures_are_those_of_torch_fidelity(held_out, tmp_path):
    images, labels = held_out
    samples = str(write_samples(tmp_path / "samples", images[::2], labels[::2]))
    reference = str(write_samples(tmp_path / "reference", images[1::2], labels[1::2]))
    metrics = evaluate(open_samples(samples), open_samples(reference), create_extractor("digits"))
    expected = torch_fidelity.calculate_metrics(
        input1=samples,
        input2=reference,
        feature_extractor="gspn-dit-digits",
        feature_extractor_weights_path=WEIGHTS,
        fid=True,
        isc=True,
        prc=True,
        feature_layer_prc="64",
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert metrics["fd"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert metrics["classifier_score_torch_fidelity"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert metrics["classifier_score_torch_fidelity_std"] == pytest.approx(expected["inception_score_std"], rel=1e-6)
    assert metrics["precision"] == pytest.approx(expected["precision"], rel=1e-6)
    assert metrics["recall"] == pytest.approx(expected["recall"], rel=1e-6)
