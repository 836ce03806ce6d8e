"""The command `sample.py`, run as a person runs it, and its one-line refusals."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_runs import make_run
from PIL import Image

from gspn_dit.options import command
from gspn_dit.sample import SampleOptions, main

SCRIPT = Path(__file__).parent.parent / "sample.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A flow run of 3 classes whose pictures are 16×16."""
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def sample(*arguments: str) -> None:
    command(main, SampleOptions, prog="sample.py", argv=[*arguments, "--device", "cpu"])


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.slow
def test_as_a_person_runs_it(run, tmp_path):
    arguments = ["--model", run, "--class-labels", "2,tabby cat", "--num-images", "5", "--out", tmp_path / "grid.png",
                 "--npz", tmp_path / "batch.npz", "--guidance-scale", "2", "--sampler", "heun",
                 "--num-inference-steps", "2", "--seed", "3", "--batch-size", "2"]  # fmt: skip
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5/5" in done.stderr  # the bar of images
    assert "grid.png" in done.stdout
    with np.load(tmp_path / "batch.npz") as batch:
        assert batch["arr_0"].shape == (5, 16, 16, 3)
        assert batch["arr_0"].dtype == np.uint8
        assert batch["labels"].tolist() == [2, 1, 2, 1, 2]
    assert Image.open(tmp_path / "grid.png").width > Image.open(tmp_path / "grid.png").height  # 3 × 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch.npz", "grid.png"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--class-labels", "3"), ("--model", "nowhere")])
def test_a_refusal_is_one_line_and_status_2(run, tmp_path, arguments):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--model", run, "--out", tmp_path / "grid.png", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("sample.py: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["pictures/", "new/pictures"])
def test_folder_of_pictures(run, tmp_path, out):
    sample("--model", str(run), "--num-images", "4", "--out", f"{tmp_path}/{out}")
    folder = tmp_path / out
    names = [f"{i:06d}.png" for i in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "labels.csv"]
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["file", "label"], *([name, label] for name, label in zip(names, "0120", strict=True))]
    assert pictures(folder).shape == (4, 16, 16, 3)


def test_pictures_do_not_depend_on_the_batch_size(run, tmp_path):
    for size in ("1", "5"):
        sample("--model", str(run), "--num-images", "5", "--batch-size", size, "--out", str(tmp_path / size))
    one, five = (pictures(tmp_path / size).astype(int) for size in ("1", "5"))
    assert np.abs(one - five).max() <= 1
    assert np.abs(one[0] - one[3]).max() > 1  # same class, other noise


def test_more_images_start_with_the_same_ones(run, tmp_path):
    for count in ("2", "5"):
        sample("--model", str(run), "--num-images", count, "--npz", str(tmp_path / f"{count}.npz"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.npz", "5.npz"]  # no picture beside an npz alone
    two, five = (np.load(tmp_path / f"{count}.npz")["arr_0"].astype(int) for count in ("2", "5"))
    assert np.abs(two - five[:2]).max() <= 1


def test_other_size_and_seed(run, tmp_path):
    options = ("--model", str(run), "--num-images", "1")
    for name, *more in [("wide", "--width", "24"), ("seed0",), ("seed1", "--seed", "1"), ("again", "--seed", "0")]:
        sample(*options, "--npz", str(tmp_path / f"{name}.npz"), *more)
    arrays = {path.stem: np.load(path)["arr_0"] for path in tmp_path.iterdir()}
    assert arrays["wide"].shape == (1, 16, 24, 3)
    assert np.array_equal(arrays["seed0"], arrays["again"])
    assert not np.array_equal(arrays["seed0"], arrays["seed1"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--class-labels 0,7", "class_labels=7: the model has classes 0 to 2"),
        ("--class-labels retriever", "did you mean 'golden retriever'?"),
        ("--height 18", "height=18: wanted a positive multiple of 4 pixels"),
        ("--sampler ddim", "sampler='ddim': the flow objective is sampled with euler, heun"),
        ("--num-inference-steps 5000", "num_inference_steps=5000"),
        ("--num-images 0", "num_images=0"),
        ("--seed -1", "seed=-1"),
        ("--guidance-scale 0.5", "guidance_scale=0.5"),
        ("--guidance-interval [0.8,0.2]", "guidance_interval"),
        ("--out picture.jpg", "out='picture.jpg': wanted a .png file or a folder"),
        ("--npz batch.zip", "npz='batch.zip'"),
        ("--device abacus", "device='abacus'"),
        ("--colour red", "--colour: no such option"),
        ("--class-labels 3 7", "'7' after --class-labels 3"),
        ("--guidance-interval 0.5,0.5", "guidance_interval"),
        ("--out new/folder/ --class-labels 7", "class_labels=7"),
    ],
)
def test_refusals(run, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    argv = ["--model", str(run), "--device", "cpu", *arguments.split()]
    with pytest.raises(SystemExit) as exit:
        command(main, SampleOptions, prog="sample.py", argv=argv)
    assert exit.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("sample.py: error: ")
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places_are_refused(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit:
        sample("--model", str(run), "--out", str(tmp_path / "file" / "grid.png"))
    assert exit.value.code == 2
    assert "choose another path" in capsys.readouterr().err


def test_old_pictures_are_not_mixed_with_new(run, tmp_path, capsys):
    sample("--model", str(run), "--num-images", "3", "--out", str(tmp_path))
    sample("--model", str(run), "--num-images", "3", "--out", str(tmp_path))  # the same again is welcome
    with pytest.raises(SystemExit):
        sample("--model", str(run), "--num-images", "2", "--out", str(tmp_path))
    assert "000002.png" in capsys.readouterr().err
    assert len(pictures(tmp_path)) == 3
