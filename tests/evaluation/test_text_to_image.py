"""The command `evaluate-t2i`: CLIP score, caption accuracy and Fréchet distance of folders of images of texts."""

import json
from pathlib import Path

import pytest
import torch
from made.clip import SIDE, write_clip
from made.images import write_images
from made.launched import ROOT, run_warm
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from gspn_dit.commands import EvaluateTextToImageOptions as Options
from gspn_dit.data import open_captioned
from gspn_dit.data.image_folder import read_square
from gspn_dit.demo.scene_reading import caption_accuracy
from gspn_dit.evaluation.evaluate import evaluate
from gspn_dit.evaluation.extractors import create_extractor
from gspn_dit.evaluation.image_sets import open_samples
from gspn_dit.evaluation.text_to_image import main
from gspn_dit.options import command
from gspn_dit.storage.pictures import save_image

pytestmark = pytest.mark.filterwarnings("ignore:.*rank-deficient")
TEXTS = ("a red three", "a blue seven", "a green three left of a red seven", "of a, of a", 'blue "green"')


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def samples(tmp_path) -> Path:
    """A folder as `generate` writes it, of images that are not square."""
    folder = tmp_path / "samples"
    write_images(folder, len(TEXTS), (24, 40))
    write_prompts(folder, TEXTS)
    (folder / "settings.json").write_text("{}")
    return folder


def write_prompts(folder: Path, texts) -> None:
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def scenes(tmp_path) -> tuple[Path, list[str]]:
    """A folder of scenes as `sample` and `generate` write it, and captions of which one is another scene's."""
    folder, images = tmp_path / "scenes", open_captioned("scenes", 64, split="test")
    captions = [images.caption(max(i, 1)) for i in range(5)]
    folder.mkdir()
    for i in range(5):
        save_image(images[i][0], folder / f"{i}.png")
    write_prompts(folder, captions)
    return folder, captions


def figures_of(tmp_path, **options) -> dict:
    argv = [f"--{key}={value}" for key, value in {"out": tmp_path / "figures.json", "device": "cpu", **options}.items()]
    command(main, Options, prog="evaluate-t2i", argv=argv)
    return json.loads((tmp_path / "figures.json").read_text())


def by_hand(clip: Path, samples: Path, texts) -> float:
    """The CLIP score by transformers' own call."""
    model = CLIPModel.from_pretrained(clip).eval()
    pictures = [Image.open(samples / f"{i}.png") for i in range(len(texts))]
    pixels = CLIPImageProcessor.from_pretrained(clip)(images=pictures, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(clip)(list(texts), padding=True, return_tensors="pt")
    with torch.inference_mode():
        found = model(**tokens, **pixels)
    return (found.image_embeds * found.text_embeds).sum(dim=1).mean().item()


@pytest.mark.filterwarnings("error")
def test_the_clip_score_is_transformers(clip, samples, tmp_path):
    figures = figures_of(tmp_path, samples=samples, clip=clip)
    wanted = by_hand(clip, samples, TEXTS)
    assert figures["clip_score"] == pytest.approx(wanted, abs=1e-6)
    assert figures["num_samples"] == len(TEXTS) and len(figures["clip_weights"]) == 64
    write_prompts(samples, TEXTS[1:] + TEXTS[:1])
    assert abs(figures_of(tmp_path, samples=samples, clip=clip)["clip_score"] - wanted) > 1e-3


def test_scenes_are_read_back(scenes, tmp_path):
    folder, captions = scenes
    figures = figures_of(tmp_path, samples=folder, captions="scenes")
    images = open_samples(str(folder))
    assert figures["caption_accuracy"] == caption_accuracy((images.read(i) for i in range(5)), captions)
    assert figures["caption_accuracy"]["all"] == 0.8  # of the first, the caption is that of the second


@pytest.mark.slow
def test_several_processes_find_the_same(clip, scenes, tmp_path):
    folder, _ = scenes
    options = {"samples": folder, "captions": "scenes", "clip": clip, "reference": folder, "features": "photos"}
    alone = figures_of(tmp_path, **options)
    script = ROOT / "gspn_dit" / "evaluation" / "text_to_image.py"
    run_warm(2, script, *(f"--{key}={value}" for key, value in options.items()), f"--out={tmp_path / 'two.json'}")
    together = json.loads((tmp_path / "two.json").read_text())
    assert together.keys() == alone.keys()
    assert together["caption_accuracy"] == alone["caption_accuracy"]
    for key in ("clip_score", "fd"):
        assert together[key] == pytest.approx(alone[key], abs=1e-4)


def test_the_distance_is_that_of_the_cropped_images(samples, tmp_path):
    """Of samples and of a reference whose images differ in size, as COCO's do."""
    reference = tmp_path / "reference"
    for i, size in enumerate([(40, 30), (33, 50), (32, 32), (64, 48)]):
        write_images(reference / str(i), 1, size)
    options = {"samples": samples, "reference": reference, "features": "photos", "image-size": 32}
    figures = figures_of(tmp_path, **options)
    for folder in (samples, reference):
        place = tmp_path / f"cropped-{folder.name}"
        place.mkdir()
        for i, file in enumerate(sorted(folder.rglob("*.png"))):
            save_image(read_square(str(file), 32)[0], place / f"{i}.png")
    cropped = [open_samples(str(tmp_path / f"cropped-{folder.name}")) for folder in (samples, reference)]
    assert figures["fd"] == pytest.approx(evaluate(*cropped, create_extractor("photos"), quick=True)["fd"], rel=1e-9)
    assert figures["num_reference"] == 4 and figures["image_size"] == [32, 32]


def spoil_table(folder):
    (folder / "metadata.jsonl").unlink()


def spoil_line(folder):
    (folder / "metadata.jsonl").write_text('{"file": "0.png", "text": "a"}\n')


def leave_one_untold(folder):
    write_prompts(folder, TEXTS[:-1])


def leave_one_undrawn(folder):
    write_prompts(folder, (*TEXTS, "a"))


def nothing(folder):
    pass


@pytest.mark.parametrize(
    ("spoil", "options", "named"),
    [
        (nothing, {}, ["--reference", "one of reference, clip and captions"]),
        (nothing, {"captions": "haiku"}, ["captions='haiku'", "scenes"]),
        (nothing, {"captions": "scenes"}, ["a red three"]),
        (nothing, {"clip": "nowhere"}, ["clip='nowhere'", "no config.json there"]),
        (nothing, {"reference": "nowhere", "features": "photos"}, ["reference='nowhere'", "no such folder"]),
        (nothing, {"clip": "nowhere", "image-size": 8}, ["image-size=8", "a reference with it"]),
        (nothing, {"reference": "photos", "features": "photos"}, ["square samples"]),
        (spoil_table, {"captions": "scenes"}, ["nothing says what its images show: no metadata.jsonl"]),
        (spoil_line, {"captions": "scenes"}, ["line 1 of", "metadata.jsonl has no file_name"]),
        (leave_one_untold, {"captions": "scenes"}, ["no text for 4.png (1 of 5 images have none)"]),
        (
            leave_one_undrawn,
            {"captions": "scenes"},
            ["5.png is not there (1 of 6 images are missing)", "draw them all"],
        ),
    ],
)
def test_mistakes_are_answered_in_one_line(samples, tmp_path, capsys, spoil, options, named):
    spoil(samples)
    refused(tmp_path, capsys, {"samples": samples, **options}, named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "preprocessor_config.json").unlink(), ["no preprocessor_config.json there"]),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "siglip"}'), ["type 'siglip'"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["it cannot be read"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12"), ["it cannot be read"]),
        (lambda folder: [file.unlink() for file in folder.glob("*token*")], ["holds no tokenizer"]),
    ],
)
def test_a_clip_that_lacks_something_is_refused(samples, tmp_path, capsys, change, named):
    clip = write_clip(tmp_path / "clip")
    change(clip)
    refused(tmp_path, capsys, {"samples": samples, "clip": clip}, ["clip=", *named])


def test_a_processor_of_another_size_is_refused(samples, tmp_path, capsys):
    clip = write_clip(tmp_path / "clip", side=SIDE + 8)
    refused(tmp_path, capsys, {"samples": samples, "clip": clip}, ["(3, 24, 24) of an image, not (3, 16, 16)"])


def refused(tmp_path, capsys, options, named) -> None:
    argv = [f"--{key}={value}" for key, value in {"out": tmp_path / "figures.json", **options}.items()]
    with pytest.raises(SystemExit) as stopped:
        command(main, Options, prog="evaluate-t2i", argv=argv)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert line.startswith("evaluate-t2i: error: ")
    assert all(words in line for words in named), line
    assert not (tmp_path / "figures.json").exists()
