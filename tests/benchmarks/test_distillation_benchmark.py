"""benchmarks/distillation.py: mixers taught alike by a teacher of scenes, and judged beside it."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from made.stable_diffusion import tiny_sd, tiny_sd_pipeline

from benchmarks.commands import DISTILLATION_MIXERS
from benchmarks.deadline import GO_ON
from benchmarks.distillation import Options, main
from benchmarks.distillation_cell import View, moments
from gspn_dit.autoencoder import load_vae
from gspn_dit.commands import EncodeTextToImageOptions
from gspn_dit.data.encode_t2i import main as encode
from gspn_dit.demo.scenes import Scenes
from gspn_dit.errors import InputError
from gspn_dit.evaluation.metrics import frechet_distance
from gspn_dit.options import parse
from gspn_dit.storage.pictures import save_image

VIEWS = (View("1×"), View("2× by ladder", split="test", times=2, by_ladder=True, share=0.5))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher of scenes that has learned nothing, and a store of four of them."""
    folder = tmp_path_factory.mktemp("scenes")
    pipe = tiny_sd_pipeline(unet=tiny_sd(block_out_channels=(8, 16, 16), norm_num_groups=4, attention_head_dim=2))
    pipe.register_modules(vae=load_vae("scenes"))
    pipe.save_pretrained(folder / "teacher")
    scenes = Scenes()
    for i in range(4):
        (folder / "pictures").mkdir(exist_ok=True)
        save_image(scenes[i][0], folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(scenes.caption(i))
    store = {"data": str(folder / "pictures"), "out": str(folder / "store"), "image_size": 64, "num_workers": 0}
    encode(EncodeTextToImageOptions(base=str(folder / "teacher"), **store))
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("benchmarks.distillation_cell.VIEWS", VIEWS)
    monkeypatch.setattr("benchmarks.distillation_report.VIEWS", VIEWS)
    monkeypatch.setattr("benchmarks.distillation_cell.ERRORS", {1: 2, 2: 1})
    monkeypatch.setattr("benchmarks.distillation_cell.REFERENCES", 8)


def few(made, out, **changes):
    """Two steps of each stage."""
    given = {"mixers": ["teacher", "gspn"], "seeds": 1, "layerwise_steps": 2, "steps": 2, "batch_size": 2}
    given |= {"num_inference_steps": 5, "images": 4}
    return Options(**{"teacher": str(made / "teacher"), "data": str(made / "store"), "out": str(out)} | given | changes)


def results(out):
    return {str(path.parent.relative_to(out)): json.loads(path.read_text()) for path in out.rglob("result.json")}


def test_layers_are_taught_and_judged_beside_their_teacher(made, tmp_path, monkeypatch, capsys):
    main(few(made, tmp_path))
    assert "all is done" in capsys.readouterr().out
    found = results(tmp_path)
    teacher, ours = found["teacher/seed-0"], found["gspn/seed-0"]
    assert {name: view["images"] for name, view in ours["views"].items()} == {"1×": 4, "2× by ladder": 2}
    assert {stage: len(losses) for stage, losses in ours["losses"].items()} == {"layerwise": 1, "run": 1}
    assert teacher["errors"] is None and min(ours["errors"].values()) > 0 and list(ours["errors"]) == ["1×", "2×"]
    assert (tmp_path / "gspn" / "seed-0" / "layers" / "config.json").is_file()  # to mount
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "losses.png",
        "pictures-1x.png",
        "pictures-2x-by-ladder.png",
    }
    monkeypatch.setattr("benchmarks.distillation_cell.train", None)  # it would fail: what is finished is not done again
    main(few(made, tmp_path))
    assert results(tmp_path) == found
    with pytest.raises(InputError, match="was begun with steps=2"):
        main(few(made, tmp_path, steps=3))


def test_one_that_is_stopped_goes_on(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.distillation_cell.train", lambda config: None)  # as one that is stopped at once
    main(few(made, tmp_path))
    assert list(results(tmp_path)) == ["teacher/seed-0"] and GO_ON in capsys.readouterr().out


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_ends_at_its_size(view):
    stages = view.stages(20, 4)
    assert stages[-1].size == (64 * view.times, 64 * view.times)
    assert all(after.size == tuple(2 * side for side in before.size) for before, after in pairwise(stages))


def test_real_scenes_are_nearer_to_real_scenes_than_what_is_drawn_wrong():
    scenes = Scenes("train", seed=3)
    ours, others = ([scenes[i][0] for i in range(start, start + 40)] for start in (0, 40))
    reference = moments(others)
    wrong = [torch.rot90(picture, 1, (1, 2)).flip(0) for picture in ours]
    assert frechet_distance(moments(ours), reference) < frechet_distance(moments(wrong), reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixers", "[conv]"], f"mixers='conv': wanted one of {', '.join(DISTILLATION_MIXERS)}"),
        (["--images", "1"], "images=1: wanted 2 or more"),
        (["--steps", "0"], "steps=0: wanted 1 or more"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(Options, ["--teacher", "t", "--data", "d", *arguments], exit_on_error=False)


def test_data_that_are_no_store_are_refused_before_anything_is_written(made, tmp_path):
    with pytest.raises(InputError, match="wanted a store that `gspn-dit encode-t2i` made"):
        main(few(made, tmp_path / "out", data=str(tmp_path)))
    assert not (tmp_path / "out").exists()
