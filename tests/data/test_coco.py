"""Prompts drawn from COCO's captions, and images of them scored: the whole way on a made file."""

import json

import pytest
from made.clip import write_clip
from made.images import write_images
from made.stable_diffusion import tiny_sd_pipeline

from gspn_dit.__main__ import main as gspn_dit
from gspn_dit.data.coco import draw_captions
from gspn_dit.errors import InputError
from gspn_dit.inference.prompts import read_prompts

PICTURES = 12


@pytest.fixture
def captions(tmp_path):
    """A file as COCO's captions_val2014.json: five captions of each picture, in no order, and a picture without."""
    images = [{"id": 7 * i, "file_name": f"COCO_val2014_{7 * i:012}.jpg", "width": 640} for i in range(PICTURES + 1)]
    annotations = [
        {"id": 100 * k + i, "image_id": 7 * i, "caption": f" A picture {i}\nin words {k}. "}
        for k in range(5)
        for i in range(PICTURES)
    ]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"info": {}, "images": images[::-1], "annotations": annotations, "licenses": []}))
    return path


def test_one_caption_is_drawn_of_each_picture(captions):
    drawn = draw_captions(captions, PICTURES)
    assert len({name for name, _ in drawn}) == PICTURES
    for name, text in drawn:
        start, _, words = text.partition(" in words ")
        assert start == f"A picture {int(name[13:25]) // 7}" and words in ("0.", "1.", "2.", "3.", "4.")
    assert len({text[-2:] for _, text in drawn}) > 1  # not always the first
    assert [name for name, _ in drawn] != sorted(name for name, _ in drawn)


def test_the_draw_is_the_seeds_and_fewer_are_the_first_of_more(captions):
    whole = draw_captions(captions, PICTURES, seed=3)
    content = json.loads(captions.read_text())
    captions.write_text(json.dumps({"images": content["images"][::-1], "annotations": content["annotations"][::-1]}))
    assert draw_captions(captions, PICTURES, seed=3) == whole != draw_captions(captions, PICTURES, seed=4)
    assert {name for name, _ in draw_captions(captions, 5, seed=3)} <= {name for name, _ in whole}
    assert draw_captions(captions, 5, seed=3) == whole[:5]


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": "a"}]}']
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(InputError, match=r"captions='.*file\.json'.*cannot be read as COCO's captions"):
        draw_captions(tmp_path / "file.json", 1)


def test_a_mistake_is_answered_in_one_line(captions, tmp_path, capsys):
    for argv, named in (
        (["nowhere.json", "coco.jsonl"], "captions='nowhere.json': no such file"),
        ([captions, tmp_path / "coco.txt"], ".jsonl"),
        ([captions, tmp_path / "coco.jsonl"], "num-captions=30000"),
    ):
        with pytest.raises(SystemExit) as stopped:
            gspn_dit(["coco-prompts", *map(str, argv)])
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and printed.count("\n") == 1
        assert printed.startswith("gspn-dit coco-prompts: error: ") and named in printed, printed
    assert not list(tmp_path.glob("*coco*"))


def test_more_than_there_are_pictures_is_refused(captions):
    with pytest.raises(InputError, match=r"num_captions=13.*captions of 12 pictures"):
        draw_captions(captions, PICTURES + 1)


@pytest.mark.filterwarnings("ignore:.*rank-deficient", "ignore:.*longer than the model reads", "ignore:cut to")
def test_from_captions_to_figures(captions, tmp_path, monkeypatch):
    """The commands of the document, with a tiny pipeline, a tiny CLIP, and the photos' features for Inception's."""
    monkeypatch.chdir(tmp_path)
    tiny_sd_pipeline().save_pretrained("sd")
    write_clip(tmp_path / "clip")
    write_images(tmp_path / "val2014", 4, (40, 52))
    gspn_dit(["coco-prompts", str(captions), "coco.jsonl", "--num-captions", "3"])
    assert read_prompts("coco.jsonl") == [text for _, text in draw_captions(captions, 3)]
    drawing = "--model sd --guidance-scale 7.5 --num-inference-steps 1 --device cpu --mixed-precision no"
    gspn_dit(["generate", "--prompts", "coco.jsonl", *drawing.split(), "--out", "images"])
    scoring = "--reference val2014 --image-size 24 --features photos --clip clip --device cpu --out figures.json"
    gspn_dit(["evaluate-t2i", "--samples", "images", *scoring.split()])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["num_samples"], figures["num_reference"]) == (3, 4)
    assert figures["fd"] > 0 and -1 <= figures["clip_score"] <= 1


def test_a_jsonl_of_no_prompts_is_refused(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(InputError, match=r"line 1 of .*prompts\.jsonl has no text"):
        read_prompts(str(tmp_path / "prompts.jsonl"))
    (tmp_path / "prompts.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"prompts=.*no lines in it"):
        read_prompts(str(tmp_path / "prompts.jsonl"))
