"""A trained classifier: found, asked by a command, scored by a command in any number of processes."""

import json

import pytest
import torch
from made.classifying import write_idx_folder
from made.images import write_images
from made.launched import ROOT, run_warm
from PIL import Image

from gspn_dit.commands import run
from gspn_dit.data.pictures import open_judged
from gspn_dit.errors import InputError
from gspn_dit.inference.image_classifier import ImageClassifier, load_classifier
from gspn_dit.models import create_classifier
from gspn_dit.storage.packaged import PACKAGED_IMAGE_CLASSIFIERS

NAMES = ["low", "middle", "high"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a saved classifier of three classes."""
    torch.manual_seed(0)
    made = create_classifier(
        "gspn-grouped-pico", widths=[16, 32], depths=[1, 1], group_width=8, num_classes=3,
        pretrained_cfg={"input_size": (1, 12, 12), "label_names": NAMES},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("model") / "saved"
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_idx_folder(tmp_path_factory.mktemp("idx") / "data")


def test_a_saved_classifier_prepares_pictures_of_any_kind(model):
    asked = ImageClassifier.load(model)
    assert asked.class_names == NAMES
    pixels = torch.randint(0, 256, (12, 12), dtype=torch.uint8)
    grey = Image.fromarray(pixels.numpy())
    probabilities = asked([grey, grey.convert("RGB"), Image.new("RGBA", (50, 31), "red")])
    assert probabilities.shape == (3, 3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    torch.testing.assert_close(probabilities[0], probabilities[1])
    expected = load_classifier(model)((pixels[None, None].float() / 255 - 0.5) / 0.5).softmax(1)
    torch.testing.assert_close(probabilities[:1], expected.detach())


def test_classify_names_the_likeliest_classes_of_each_picture(model, tmp_path, capsys):
    write_images(tmp_path, count=2, size=(12, 12))
    files = [str(tmp_path / name) for name in ("0.png", "1.png")]
    run("classify", argv=[*files, "--model", str(model), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    asked = ImageClassifier.load(model)
    for path, line in zip(files, lines, strict=True):
        best = asked([Image.open(path)])[0].topk(2)
        named = ", ".join(f"{NAMES[int(i)]} {p:.1%}" for p, i in zip(best.values, best.indices, strict=True))
        assert line == f"{path}: {named}"
    run("classify", argv=["--model", str(model), "--image-size", "24", *files[:1]])
    assert capsys.readouterr().out.count("%") == 3


def score(model, data, out, *more):
    run("evaluate-classifier", argv=[str(model), "--data", str(data), "--out", str(out), *map(str, more)])
    return json.loads(out.read_text())


def test_evaluate_classifier_is_right_and_heeds_how_pictures_are_prepared(model, data, tmp_path, capsys):
    found = score(model, data, tmp_path / "scores.json", "--batch-size", 3)
    said = capsys.readouterr().out
    assert f"top1 {found['top1']:.2f}%" in said and "10 images (12 px, crop_pct 1, bicubic)" in said
    images, labels = open_judged(str(data)).array.float() / 127.5 - 1, torch.arange(10) % 3
    right = load_classifier(model)(images).argmax(1) == labels
    assert found["top1"] == pytest.approx(100 * right.float().mean().item())
    assert found["num_images"] == 10 and found["top5"] == 100
    changed = score(model, data, tmp_path / "larger.json", "--image-size", 24, "--crop-pct", 0.8)
    assert (changed["image_size"], changed["crop_pct"]) == (24, 0.8) and changed["loss"] != found["loss"]


@pytest.mark.slow
def test_two_processes_score_as_one(model, data, tmp_path):
    one = score(model, data, tmp_path / "one.json")
    arguments = ("evaluate-classifier", model, "--data", data, "--out", tmp_path / "two.json", "--batch-size", 2)
    printed = run_warm(2, ROOT / "gspn_dit" / "__main__.py", *arguments)
    two = json.loads((tmp_path / "two.json").read_text())
    assert printed.count("top1") == 1
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-5) and two == one


@pytest.mark.parametrize(
    ("verb", "argv", "said"),
    [
        ("classify", ["nowhere.png"], "--pictures='nowhere.png': no such file; wanted a picture file"),
        ("classify", ["{text}"], "cannot be read as a picture"),
        ("classify", ["{picture}", "--top", "0"], "--top=0"),
        ("classify", ["{picture}", "--model", "nowhere"], "--model='nowhere': no such folder"),
        ("classify", ["{picture}", "--model", "{folder}"], "has no config.json that can be read"),
        ("evaluate-classifier", ["{model}", "--data", "nowhere"], "--data='nowhere': no such folder"),
        ("evaluate-classifier", ["{model}", "--data", "digits"], "--data='digits': its classes are not the model's"),
        ("evaluate-classifier", ["{model}", "--data", "{data}", "--crop-pct", "0"], "--crop-pct=0.0"),
        ("evaluate-classifier", ["{model}"], "--data: missing"),
    ],
)
def test_bad_input_is_one_line(model, data, tmp_path, capsys, verb, argv, said):
    write_images(tmp_path, count=1)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder").mkdir()
    names = {"picture": tmp_path / "0.png", "text": tmp_path / "text.png", "folder": tmp_path / "folder"}
    with pytest.raises(SystemExit) as stopped:
        run(verb, argv=[word.format(model=model, data=data, **names) for word in argv])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and said in printed and printed.count("\n") == 1


def test_a_packaged_classifier_is_found_by_its_name(model, monkeypatch):
    monkeypatch.setitem(PACKAGED_IMAGE_CLASSIFIERS, "bars", model)
    assert ImageClassifier.load("bars").class_names == NAMES
    with pytest.raises(InputError, match=r"^model='barz': no such folder; wanted .*fashion or bars"):
        load_classifier("barz")
