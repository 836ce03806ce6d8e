"""The command `sample.py`, run as a person runs it, and its one-line refusals."""

import csv
import errno
import io
import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from made.faults import _context as warm
from made.launched import WarmLaunch, kill_one_process, run_warm
from made.runs import CLASS_NAMES, make_run
from PIL import Image

from gspn_dit.commands import SampleOptions
from gspn_dit.config import Config, DiffusionConfig, TrainingConfig
from gspn_dit.errors import InputError
from gspn_dit.evaluation.image_sets import open_samples
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.inference.sample import main
from gspn_dit.options import command
from gspn_dit.storage.pictures import save_npz
from gspn_dit.training.diffusion import check_options

SCRIPT = Path(__file__).parents[2] / "sample.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A flow run of 3 classes whose pictures are 16×16."""
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def sample(*arguments: str) -> None:
    command(main, SampleOptions, prog="sample.py", argv=[*arguments, "--device", "cpu"], continues=True)


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.slow
def test_as_a_person_runs_it(run, tmp_path):
    arguments = [
        "--model",
        run,
        "--class-labels",
        "2,tabby cat",
        "--num-images",
        "5",
        "--out",
        tmp_path / "grid.png",
        "--npz",
        tmp_path / "batch.npz",
        "--guidance-scale",
        "2",
        "--sampler",
        "heun",
        "--num-inference-steps",
        "2",
        "--seed",
        "3",
        "--batch-size",
        "2",
    ]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sampling: 5 images" in done.stderr  # in a log a line, where a terminal has a bar
    assert "grid.png" in done.stdout
    with np.load(tmp_path / "batch.npz") as batch:
        assert batch["arr_0"].shape == (5, 16, 16, 3)
        assert batch["arr_0"].dtype == np.uint8
        assert batch["arr_1"].tolist() == batch["labels"].tolist() == [2, 1, 2, 1, 2]
    assert Image.open(tmp_path / "grid.png").width > Image.open(tmp_path / "grid.png").height  # 3 × 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch.npz", "grid.png"]


@pytest.mark.slow
def test_a_refusal_is_one_line_and_status_2(run, tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--model", run, "--out", tmp_path / "grid.png", "--class-labels", "3"],
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
    assert sorted(path.name for path in folder.iterdir()) == [*names, "labels.csv", "settings.json"]
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    labels = [0, 1, 2, 0]
    expected = [[name, str(label), CLASS_NAMES[label]] for name, label in zip(names, labels, strict=True)]
    assert rows == [["file", "label", "name"], *expected]
    assert open_samples(str(folder)).class_names == dict(enumerate(CLASS_NAMES))  # and evaluation reads them
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


def test_as_many_pixels_at_a_time_at_any_size(run, tmp_path, monkeypatch):
    batches, call = [], GSPNDiTPipeline.__call__

    def counted(pipe, class_labels, **options):
        batches.append(len(class_labels))
        return call(pipe, class_labels, **options)

    monkeypatch.setattr(GSPNDiTPipeline, "__call__", counted)
    for size, expected in (("8", [16, 1]), ("16", [16, 1]), ("32", [4, 4, 4, 4, 1]), ("80", [1, 1])):
        batches.clear()
        count = str(sum(expected))
        sample(
            "--model",
            str(run),
            "--num-images",
            count,
            "--npz",
            str(tmp_path / f"{size}.npz"),
            "--height",
            size,
            "--width",
            size,
            "--num-inference-steps",
            "1",
            "--shift",
            "auto",
            "--chunk-scale",
            "auto",
        )
        assert batches == expected


def test_options_reach_the_draw(run, tmp_path, monkeypatch):
    drawn, call = [], GSPNDiTPipeline.__call__

    def spied(pipe, class_labels, **options):
        drawn.append(options | {"sampler": type(pipe.scheduler).__name__})
        return call(pipe, class_labels, **options)

    monkeypatch.setattr(GSPNDiTPipeline, "__call__", spied)
    sample(
        "--model",
        str(run),
        "--num-images",
        "1",
        "--npz",
        str(tmp_path / "one.npz"),
        "--guidance-scale",
        "3",
        "--guidance-interval",
        "0.2,0.5",
        "--num-inference-steps",
        "4",
        "--sampler",
        "heun",
        "--shift",
        "2",
        "--chunk-scale",
        "2",
        "--mixed-precision",
        "bf16",
    )
    wanted = {
        "guidance_scale": 3,
        "guidance_interval": (0.2, 0.5),
        "num_inference_steps": 4,
        "shift": 2,
        "sampler": "FlowMatchHeunDiscreteScheduler",
        "chunk_scale": 2,
        "mixed_precision": "bf16",
    }
    (options,) = drawn
    assert {key: options.get(key) for key in wanted} == wanted


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
        ("--model nowhere", "--model='nowhere': "),
        ("--class-labels 0,7", "--class-labels=7: the model has classes 0 to 2"),
        ("--class-labels retriever", "did you mean 'golden retriever'?"),
        ("--height 18", "--height=18: wanted a positive multiple of 4 pixels"),
        ("--sampler ddim", "sampler='ddim': the flow objective is sampled with euler, heun"),
        ("--num-inference-steps 5000", "--num-inference-steps=5000"),
        ("--num-images 0", "--num-images=0"),
        ("--batch-size 0", "--batch-size=0"),
        ("--shift slow", "--shift='slow': wanted a number or auto or null"),
        ("--shift 0", "--shift=0.0: wanted a positive number, or auto"),
        ("--chunk-scale -2", "--chunk-scale=-2.0: wanted a positive number, or auto"),
        ("--seed -1", "--seed=-1"),
        ("--guidance-scale 0.5", "--guidance-scale=0.5"),
        ("--guidance-scale .nan", "--guidance-scale=nan: wanted 1 (none) or more"),
        ("--guidance-scale 1e999", "--guidance-scale=inf: wanted 1 (none) or more"),
        ("--guidance-interval 0,.nan", "--guidance-interval=(0.0, nan)"),
        ("--class-labels 0,1,2 --num-images 2", "--num-images=2: fewer than the 3 class_labels"),
        ("--num-images 99999999999", "out='samples.png': at least 409.6 TB are to be written, and '"),
        ("--num-images 99999999999 --out many/", "out='many/': at least 409.6 TB are to be written, and '"),
        ("--height 4000000 --width 4000000", "--height=4000000: with width=4000000, 1 at a time take over"),
        ("--batch-size 90000000 --num-images 90000000 --npz all.npz", " are to be written, and '"),
        ("--out samples-cfg-1.5", "a slash at its end makes it: samples-cfg-1.5/"),
        ("--guidance-interval [0.8,0.2]", "--guidance-interval="),
        ("--out picture.jpg", "out='picture.jpg': wanted a .png file or a folder"),
        ("--npz batch.zip", "npz='batch.zip'"),
        ("--device abacus", "device='abacus'"),
        ("--colour red", "--colour: no such option"),
        ("--class-labels 3 7", "'7' after --class-labels 3"),
        ("--guidance-interval 0.5,0.5", "--guidance-interval="),
        ("--out new/folder/ --class-labels 7", "--class-labels=7"),
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


def test_memory_is_refused_by_the_numbers(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gspn_dit.inference.memory.memory_of", lambda device: 50_000_000)
    monkeypatch.setattr("gspn_dit.inference.outputs.memory_of", lambda device: 1_000_000)
    for arguments, words in (
        ("--batch-size 1000 --num-images 1000 --out all/", "1000 at a time take over 122.9 MB, and the memory of cpu"),
        ("--num-images 1000 --batch-size 1", "a grid of 1000 images takes over 1.5 MB, and the memory is 1.0 MB"),
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            sample("--model", str(run), "--mixed-precision", "no", *arguments.split())
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and words in line
        assert list(tmp_path.iterdir()) == []


def test_a_device_or_a_link_is_written_into(run, tmp_path, capsys, devices_stay):
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "folder").symlink_to("target")
    (tmp_path / "link.png").symlink_to("target.png")
    for out in ("null.png", "link.png", "folder", "/dev/null"):
        sample("--model", str(run), "--num-images", "2", "--out", str(tmp_path / out))
    assert Path("/dev/null").is_char_device()
    assert all((tmp_path / name).is_symlink() for name in ("null.png", "link.png", "folder"))
    assert Image.open(tmp_path / "target.png").size and len(pictures(tmp_path / "target")) == 2
    assert len(list(tmp_path.iterdir())) == 5
    (tmp_path / "dangling.png").symlink_to("nowhere/grid.png")
    with pytest.raises(SystemExit):
        sample("--model", str(run), "--num-images", "2", "--out", str(tmp_path / "dangling.png"))
    assert "is a link into" in capsys.readouterr().err


def test_a_grid_for_stdout_has_no_words_in_it(run, capfdbinary):
    sample("--model", str(run), "--num-images", "2", "--out", "/dev/stdout")
    printed = capfdbinary.readouterr()
    picture = io.BytesIO(printed.out)
    assert Image.open(picture).size and picture.getvalue().endswith(b"IEND\xaeB`\x82")
    assert b"2 images: /dev/stdout" in printed.err


def test_a_full_disk_and_ctrl_c_are_one_line_and_the_same_command_goes_on(run, tmp_path, monkeypatch, capsys):
    arguments = ("--model", str(run), "--num-images", "6", "--batch-size", "1", "--out", str(tmp_path / "pictures"))
    call, sync, count = GSPNDiTPipeline.__call__, os.fsync, itertools.count()

    def full(descriptor):
        if next(count) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    def interrupted(pipe, class_labels, **options):
        if len(pictures(tmp_path / "pictures")) == 4:
            raise KeyboardInterrupt
        return call(pipe, class_labels, **options)

    def names():
        return sorted(path.name for path in (tmp_path / "pictures").iterdir())

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stopped:
        sample(*arguments)
    assert stopped.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"sample.py: error: {tmp_path / 'pictures' / '000002.png'}: No space left on device; make room there"
    assert names() == ["000000.png", "000001.png", "labels.csv", "settings.json"]

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(GSPNDiTPipeline, "__call__", interrupted)
    with pytest.raises(SystemExit) as stopped:
        sample(*arguments)
    assert stopped.value.code == 130
    assert "sample.py: interrupted; the same command goes on here" in capsys.readouterr().err.splitlines()[-1]
    assert names() == [*(f"00000{i}.png" for i in range(4)), "labels.csv", "settings.json"]

    monkeypatch.setattr(GSPNDiTPipeline, "__call__", call)
    sample(*arguments)
    assert names() == [*(f"00000{i}.png" for i in range(6)), "labels.csv", "settings.json"]


@pytest.mark.slow
def test_the_same_command_several_times_at_once_ends_well(run, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    again = ("--model", str(run), "--num-images", "6", "--out")
    for out in ("pictures", "grid.png"):
        sample(*again, str(alone / out))
    outs = [together / out for out in ("pictures", "grid.png") for _ in range(3)]
    processes = [
        # not `sample` itself: another process does not find a test's module
        warm.Process(
            target=command,
            args=(main, SampleOptions),
            kwargs={"prog": "sample.py", "argv": [*again, str(out), "--device", "cpu"], "continues": True},
        )
        for out in outs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 6
    for folder in ("", "pictures"):
        assert sorted(os.listdir(together / folder)) == sorted(os.listdir(alone / folder))
        shown, wanted = (pictures(each / folder).astype(int) for each in (together, alone))
        assert np.abs(shown - wanted).max() <= 1


def test_another_command_is_refused_before_it_waits(run, tmp_path, monkeypatch, capsys):
    arguments = ("--model", str(run), "--num-images", "2", "--out", str(tmp_path))
    sample(*arguments)
    monkeypatch.setattr("gspn_dit.inference.outputs.alone_in", lambda *_: pytest.fail("it waits"))
    with pytest.raises(SystemExit):
        sample(*arguments, "--seed", "1")
    assert "was begun with seed=0" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_a_model_without_guidance_draws_without_and_says_so(tmp_path, capsys, dropout):
    run = make_run(tmp_path / "run", class_dropout=dropout)
    sample("--model", str(run), "--num-images", "2", "--out", str(tmp_path / "pictures"))
    line = f"guidance_scale 1: trained with diffusion.class_dropout {dropout:g}, the model has not learned"
    assert line in capsys.readouterr().err
    assert json.loads((tmp_path / "pictures" / "settings.json").read_text())["guidance_scale"] == 1
    with pytest.raises(SystemExit):
        sample("--model", str(run), "--guidance-scale", "2", "--out", str(tmp_path / "other"))
    assert f"--guidance-scale=2.0: {line[18:]}" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("as_a_command_says_it")
def test_training_says_at_its_start_what_it_will_not_guide(capsys):
    config = Config(diffusion=DiffusionConfig("flow", class_dropout=0.0), training=TrainingConfig(trackers=[]))
    check_options(config)
    assert "samples are drawn at guidance_scale 1: trained with" in capsys.readouterr().err
    config.evaluation.guidance_scale = 2.0
    with pytest.raises(InputError, match=r"evaluation.guidance_scale=2.0: trained with .*class_dropout 0, .*; give 1"):
        check_options(config)


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


MANY = ("--num-images", "60", "--num-inference-steps", "20", "--seed", "7")


@pytest.fixture(scope="module")
def unbroken(run, tmp_path_factory) -> np.ndarray:
    """60 pictures by one process in one go."""
    folder = tmp_path_factory.mktemp("pictures") / "unbroken"
    sample("--model", str(run), "--out", str(folder), "--batch-size", "12", *MANY)
    return pictures(folder).astype(int)


@pytest.mark.slow
def test_killed_processes_leave_whole_pictures_and_one_goes_on(run, tmp_path, unbroken):
    folder = tmp_path / "pictures"
    process = WarmLaunch(2, SCRIPT, "--model", run, "--out", folder, "--batch-size", 1, *MANY, "--num-images", 1000)
    kill_one_process(process, 1, lambda: len(list(folder.glob("*.png"))) >= 8)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    count = max(60, 1 + max(int(path.stem) for path in kept))  # 60, unless the kill came late
    assert 8 <= len(kept) < count < 1000
    assert all(Image.open(path).convert("RGB").size == (16, 16) for path in kept)
    (folder / ".000059.png.tmp").write_bytes(b"torn")

    sample("--model", str(run), "--out", str(folder), "--batch-size", "7", *MANY, "--num-images", str(count))
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert np.abs(pictures(folder)[:60] - unbroken).max() <= 1
    assert sorted(path.suffix for path in folder.iterdir()) == [".csv", ".json", *[".png"] * count]


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_and_make_the_npz(run, tmp_path, unbroken):
    folder = tmp_path / "pictures"
    sample("--model", str(run), "--out", str(folder), *MANY, "--num-images", "13")
    printed = run_warm(2, SCRIPT, "--model", run, "--out", folder, "--npz", "--batch-size", 4, *MANY)
    assert "sampling: 60 images, 47 of them in " in printed  # 13 were there
    assert f"60 images: {folder}, {folder}.npz" in printed
    assert np.abs(pictures(folder) - unbroken).max() <= 1
    with np.load(f"{folder}.npz", allow_pickle=False) as batch:
        assert np.array_equal(batch["arr_0"], pictures(folder))
        assert batch["arr_1"].tolist() == [0, 1, 2] * 20
        assert batch["class_names"].tolist() == CLASS_NAMES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "pictures.npz"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--seed 1", "--seed=1: {} was begun with seed=0; run with the same, or choose another --out"),
        ("--guidance-scale 3", "--guidance-scale=3.0"),
        ("--guidance-interval 0,0.5", "--guidance-interval="),
        ("--num-inference-steps 4", "--num-inference-steps=4"),
        ("--sampler heun", "sampler='FlowMatchHeunDiscreteScheduler'"),
        ("--width 24", "--width=24"),
        ("--shift 2", "--shift=2.0: {} was begun with shift=None"),
        ("--chunk-scale auto", "--chunk-scale=1.0"),
        ("--class-labels 2", "--class-labels='2'"),
        ("--labels random", "labels='random'"),
        ("--model other", "model_weights="),
    ],
)
def test_a_folder_is_not_continued_with_other_settings(run, tmp_path, capsys, monkeypatch, arguments, words):
    folder = tmp_path / "pictures"
    monkeypatch.chdir(tmp_path)
    sample("--model", str(run), "--num-images", "2", "--out", str(folder))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    make_run(tmp_path / "other", steps=(5,))
    with pytest.raises(SystemExit) as stopped:
        sample("--model", str(run), "--num-images", "4", "--out", str(folder), *arguments.split())
    assert stopped.value.code == 2
    assert words.format(folder) in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_same_model_from_another_place_goes_on(run, tmp_path):
    sample("--model", str(run), "--num-images", "2", "--out", str(tmp_path / "pictures"))
    checkpoint = run / "checkpoints" / "step-0000002"
    sample("--model", str(checkpoint), "--num-images", "3", "--out", str(tmp_path / "pictures"))
    assert len(pictures(tmp_path / "pictures")) == 3


def test_pictures_of_unknown_origin_are_not_mixed_with_new(run, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "000001.png")
    with pytest.raises(SystemExit):
        sample("--model", str(run), "--num-images", "2", "--out", str(tmp_path))
    assert "holds 1 images without the settings.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["000001.png"]


def test_what_a_cut_run_left_for_an_npz_is_used_only_for_the_same(run, tmp_path):
    arguments = ("--model", str(run), "--num-images", "3", "--npz", str(tmp_path / "batch.npz"))
    sample(*arguments)
    whole = np.load(tmp_path / "batch.npz")["arr_0"]
    (tmp_path / ".batch.npz.images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / ".batch.npz.images" / "000001.png")
    (tmp_path / ".batch.npz.images" / "settings.json").write_text('{"seed": 5}')
    sample(*arguments)
    assert np.array_equal(np.load(tmp_path / "batch.npz")["arr_0"], whole)
    assert [path.name for path in tmp_path.iterdir()] == ["batch.npz"]


def test_labels_are_balanced_or_random_by_the_seed(run, tmp_path):
    from gspn_dit.inference.loading import load_pipeline
    from gspn_dit.inference.sample import choose_labels

    pipe = load_pipeline(run)

    def labels(count, **options):
        return choose_labels(pipe, SampleOptions(num_images=count, out="x/", **options))

    assert labels(5) == [0, 1, 2, 0, 1]
    drawn = labels(3000, labels="random")
    assert drawn[:1000] == labels(1000, labels="random") != labels(1000, labels="random", seed=1)
    counts = np.bincount(drawn)
    assert np.abs(counts - 1000).max() < 130  # five standard deviations of a binomial
    assert set(labels(100, labels="random", class_labels="0,goldfish")) == {0, 2}


def test_an_npz_is_written_one_image_at_a_time(tmp_path):
    side, count = 64, 2000
    images = (np.full((1, side, side, 3), i % 256, dtype=np.uint8) for i in range(count))
    labels = np.zeros(count, dtype=np.int64)
    tracemalloc.start()
    save_npz(images, (count, side, side, 3), tmp_path / "batch.npz", arr_1=labels, labels=labels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < count * side * side * 3 / 20
    with np.load(tmp_path / "batch.npz", allow_pickle=False) as batch:
        assert batch.files == ["arr_0", "arr_1", "labels"]
        assert batch["arr_0"].dtype == np.uint8 and batch["arr_0"].shape == (count, side, side, 3)
        assert np.array_equal(batch["arr_0"][:, 0, 0, 0], np.arange(count) % 256)


def test_a_bare_npz_needs_a_folder_for_its_name(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sample("--model", str(run), "--out", str(tmp_path / "grid.png"), "--npz")
    assert "npz=True: wanted a file name, or --out with a folder" in capsys.readouterr().err
