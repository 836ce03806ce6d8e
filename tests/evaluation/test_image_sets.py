"""What can be scored, and what is refused with one line that names it."""

import contextlib
import json

import numpy as np
import pytest
import torch
from made.images import write_images
from PIL import Image

from gspn_dit.commands import EvaluateOptions as Options
from gspn_dit.errors import InputError
from gspn_dit.evaluation.evaluate import evaluate, main
from gspn_dit.evaluation.image_sets import open_reference, open_samples
from gspn_dit.options import command

pytestmark = pytest.mark.filterwarnings("ignore:.*(rank-deficient|so no sfid|no precision)")


def stacked(images):
    return torch.stack([images.read(i) for i in range(len(images))]).permute(0, 2, 3, 1).numpy()


def test_a_folder_and_an_npz_of_the_same_images_are_the_same_samples(tmp_path):
    pixels = write_images(tmp_path / "folder", count=4, size=(8, 12), labels=[3, 1, 4, 1])
    np.savez(tmp_path / "batch.npz", arr_0=pixels, labels=np.array([3, 1, 4, 1]))
    np.savez(tmp_path / "adm.npz", pixels, np.array([3, 1, 4, 1]))  # as ADM's sampler saves: arr_0, arr_1
    for source in ("folder", "batch.npz", "adm.npz"):
        images = open_samples(str(tmp_path / source))
        assert images.image_size == (8, 12)
        assert images.labels == [3, 1, 4, 1]
        np.testing.assert_array_equal(stacked(images), pixels)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    Image.new("L", (5, 5), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (5, 5), (7, 7, 7, 255)).save(tmp_path / "transparent.png")
    assert (stacked(open_samples(str(tmp_path))) == np.full((2, 5, 5, 3), 7)).all()


def test_labels_may_be_in_any_order_and_name_files_in_subfolders(tmp_path):
    write_images(tmp_path / "a", count=1)
    write_images(tmp_path / "b", count=1)
    (tmp_path / "labels.csv").write_text("file,label\nb/0.png,5\na/0.png,2\n")
    assert open_samples(str(tmp_path)).labels == [2, 5]


def test_the_classes_names_come_with_the_labels(tmp_path):
    pixels = write_images(tmp_path / "folder", labels=[3, 1, 3])
    assert open_samples(str(tmp_path / "folder")).class_names is None
    (tmp_path / "folder" / "labels.csv").write_text('file,label,name\n0.png,3,cat\n1.png,1,"a, b"\n2.png,3,cat\n')
    named = open_samples(str(tmp_path / "folder"))
    assert (named.labels, named.class_names) == ([3, 1, 3], {3: "cat", 1: "a, b"})
    np.savez(tmp_path / "batch.npz", arr_0=pixels, labels=np.array([1, 1, 0]), class_names=np.array(["fish", "cat"]))
    assert open_samples(str(tmp_path / "batch.npz")).class_names == {0: "fish", 1: "cat"}
    np.savez(tmp_path / "batch.npz", arr_0=pixels, class_names=np.array([1, 2]))
    with pytest.raises(InputError, match=r"class_names is int64 \(2,\); wanted text"):
        open_samples(str(tmp_path / "batch.npz"))


def test_named_references_are_the_splits():
    assert len(open_reference("digits", (32, 32))) == 4500
    held_out = open_reference("digits:test", (32, 32))
    assert len(held_out) == 500
    assert held_out.read(0).shape == (3, 32, 32)
    with pytest.raises(InputError, match=r"reference='digits'.*64x64"):
        open_reference("digits", (64, 64))
    with pytest.raises(InputError, match=r"reference='photos'.*32x64"):
        open_reference("photos", (32, 64))


def break_image(folder):
    (folder / "1.png").write_bytes(b"not an image")


def truncate_image(folder):
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])


def another_size(folder):
    Image.new("RGB", (16, 32)).save(folder / "2.png")


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def remove(folder):
    empty(folder)
    folder.rmdir()


def no_label_for_one(folder):
    (folder / "labels.csv").write_text("file,label\n0.png,1\n2.png,1\n")


def label_without_image(folder):
    (folder / "labels.csv").write_text("file,label\n0.png,1\n1.png,1\n2.png,1\n3.png,1\n")


def label_that_is_no_number(folder):
    (folder / "labels.csv").write_text("file,label\n0.png,1\n1.png,cat\n2.png,1\n")


def label_out_of_range(folder):
    (folder / "labels.csv").write_text("file,label\n0.png,1\n1.png,10\n2.png,1\n")


def labels_without_header(folder):
    (folder / "labels.csv").write_text("0.png,1\n1.png,1\n2.png,1\n")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (break_image, ["1.png", "not a readable image"]),
        (truncate_image, ["2.png", "not a readable image"]),
        (another_size, ["0.png is 32x32", "2.png 32x16"]),
        (empty, ["samples=", "no images"]),
        (remove, ["samples=", "no such folder"]),
        (no_label_for_one, ["labels.csv", "no label for 1.png"]),
        (label_without_image, ["labels.csv", "3.png"]),
        (label_that_is_no_number, ["label='cat'", "1.png"]),
        (label_out_of_range, ["label=10", "0 to 9"]),
        (labels_without_header, ["labels.csv", "file,label"]),
    ],
)
def test_a_bad_folder_ends_the_command_in_one_line(tmp_path, capsys, spoil, named):
    write_images(tmp_path / "samples")
    spoil(tmp_path / "samples")
    refused(tmp_path, capsys, tmp_path / "samples", named)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"images": np.zeros((2, 32, 32, 3), np.uint8)}, ["no arr_0", "images"]),
        ({"arr_0": np.zeros((2, 32, 32, 3))}, ["arr_0 is float64"]),
        ({"arr_0": np.zeros((2, 3, 32, 32), np.uint8)}, ["arr_0 is uint8 (2, 3, 32, 32)"]),
        ({"arr_0": np.zeros((0, 32, 32, 3), np.uint8)}, ["N ≥ 1"]),
        ({"arr_0": np.zeros((2, 32, 32, 3), np.uint8), "labels": np.zeros(3, int)}, ["labels is int64 (3,)"]),
        ({"arr_0": np.zeros((2, 32, 32, 3), np.uint8), "arr_1": np.zeros(2)}, ["arr_1 is float64 (2,)"]),
        ({"arr_0": np.zeros((2, 32, 32, 3), np.uint8), "mu": np.zeros(2048), "sigma": np.eye(2048)}, ["mu, sigma"]),
        ({"arr_0": np.array([{}], dtype=object)}, ["not an npz file of plain arrays"]),  # numpy would unpickle it
    ],
)
def test_a_bad_npz_ends_the_command_in_one_line(tmp_path, capsys, arrays, named):
    np.savez(tmp_path / "batch.npz", **arrays)
    refused(tmp_path, capsys, tmp_path / "batch.npz", ["batch.npz", *named])


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        (
            {"mu": np.zeros(2048), "sigma": np.eye(2048)},
            ["=inception", "gspn-dit reference --features digits"],
        ),
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, ["mu is float64 (64,)", "(2048,)"]),
        ({"mu": np.zeros(2048), "sigma": np.eye(64)}, ["sigma is float64 (64, 64)", "(2048, 2048)"]),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, ["mu is float64 (2048,)", "finite"]),
        ({"mu": np.zeros(2048, int), "sigma": np.eye(2048)}, ["mu is int64 (2048,)", "finite floats"]),
        ({"mu": np.zeros(2048)}, ["mu without sigma"]),
        ({"mu": np.zeros(64), "sigma": np.eye(64), "features": "photos"}, ["=photos, not of features=digits"]),
        ({"mu": np.zeros(64), "sigma": np.eye(64), "features": "clip"}, ["features=clip", "inception, digits, photos"]),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048), "features": "digits"}, ["mu is float64 (2048,)", "(64,)"]),
        (
            {"mu": np.zeros(64), "sigma": np.eye(64), "features": "digits", "weights_sha256": "5" * 64},
            ["555555555555…", "digits_classifier.safetensors", "--weights"],
        ),
        ({"sigma_s": np.eye(2023)}, ["sigma_s without mu_s"]),
        ({"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}, ["mu_s and sigma_s without mu and sigma"]),
        (
            {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2048), "sigma_s": np.eye(2048)},
            ["mu_s is float64 (2048,)", "(2023,)"],
        ),
    ],
)
def test_statistics_that_do_not_suit_end_the_command_in_one_line(tmp_path, capsys, arrays, named):
    write_images(tmp_path / "samples")
    images = np.zeros((2, 32, 32, 3), np.uint8)  # an ADM batch: scored with features they do not fit, a wrong figure
    np.savez(tmp_path / "reference.npz", arr_0=images, **arrays)
    reference = tmp_path / "reference.npz"
    refused(tmp_path, capsys, tmp_path / "samples", ["reference=", "reference.npz", *named], reference=reference)


def test_a_flipped_bit_in_the_images_is_found(tmp_path, capsys):
    np.savez(tmp_path / "batch.npz", arr_0=write_images(tmp_path / "images"))
    damaged = bytearray((tmp_path / "batch.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "batch.npz").write_bytes(damaged)
    refused(tmp_path, capsys, tmp_path / "batch.npz", ["samples=", "batch.npz", "arr_0.npy"])


def test_compressed_and_fortran_ordered_images_are_read_too(tmp_path):
    pixels = write_images(tmp_path / "images")
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=pixels)
    np.savez(tmp_path / "columns.npz", arr_0=np.asfortranarray(pixels))
    for name in ("compressed", "columns"):
        np.testing.assert_array_equal(stacked(open_samples(str(tmp_path / f"{name}.npz"))), pixels)


def test_files_that_are_no_npz_are_refused(tmp_path, capsys):
    (tmp_path / "batch.npz").write_bytes(b"PK no")
    refused(tmp_path, capsys, tmp_path / "batch.npz", ["batch.npz", "not a readable npz"])
    (tmp_path / "image.tar").write_bytes(b"")
    refused(tmp_path, capsys, tmp_path / "image.tar", ["image.tar", "wanted a folder"])


def test_bad_options_end_the_command_in_one_line(tmp_path, capsys):
    write_images(tmp_path / "samples")
    refused(tmp_path, capsys, tmp_path / "samples", ["reference='cifar'", "no such folder"], reference="cifar")
    refused(tmp_path, capsys, tmp_path / "samples", ["features", "clip"], features="clip")
    refused(tmp_path, capsys, tmp_path / "samples", ["out=", "folder"], out=tmp_path)
    refused(tmp_path, capsys, tmp_path / "samples", ["device='abacus'"], device="abacus")
    refused(tmp_path, capsys, tmp_path / "samples", ["weights='nowhere.safetensors'"], weights="nowhere.safetensors")


def test_metrics_already_there_survive_a_failed_run(tmp_path, capsys):
    write_images(tmp_path / "samples")
    truncate_image(tmp_path / "samples")
    (tmp_path / "metrics.json").write_text(json.dumps({"fd": 1.0}))
    with pytest.raises(SystemExit):
        run(tmp_path / "samples", "digits:test", tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"fd": 1.0}


def test_the_figures_are_printed_before_they_are_written(tmp_path, capsys, monkeypatch):
    """A disk that is full shows only then, and hours of work are on the screen."""
    write_images(tmp_path / "samples")
    out = tmp_path / "metrics.json"

    def and_then_the_place_is_lost(*arguments):
        figures = evaluate(*arguments)
        out.mkdir()
        return figures

    monkeypatch.setattr("gspn_dit.evaluation.evaluate.evaluate", and_then_the_place_is_lost)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "samples", "digits:test", out)
    printed = capsys.readouterr()
    assert stopped.value.code == 1
    assert json.loads(printed.out)["num_samples"] == 3
    line = printed.err.rstrip("\n").splitlines()[-1]
    assert line.startswith("fid/evaluate.py: error: ") and str(out) in line and "Traceback" not in printed.err


def test_figures_that_cannot_be_printed_are_written(tmp_path, monkeypatch):
    write_images(tmp_path / "samples")
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        with pytest.raises(SystemExit):
            run(tmp_path / "samples", "digits:test", tmp_path / "metrics.json")
        patch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert json.loads((tmp_path / "metrics.json").read_text())["num_samples"] == 3


def test_figures_for_stdout_are_there_once(tmp_path, capfd):
    write_images(tmp_path / "samples")
    run(tmp_path / "samples", "digits:test", "/dev/stdout")
    assert json.loads(capfd.readouterr().out)["num_samples"] == 3


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    write_images(tmp_path / "samples")
    break_image(tmp_path / "samples")  # which would be refused next
    (tmp_path / "file").write_bytes(b"")
    refused(tmp_path, capsys, tmp_path / "samples", ["out=", "file"], out=tmp_path / "file" / "metrics.json")


def run(samples, reference, out, features="digits", **options):
    options = {"samples": samples, "reference": reference, "out": out, "features": features, **options}
    command(
        main,
        Options,
        prog="fid/evaluate.py",
        argv=[f"--{key}={value}" for key, value in options.items()],
    )


def refused(tmp_path, capsys, samples, named, **options):
    """The command ends with status 2, and the last line it prints, the only one about the error, names all of these."""
    with pytest.raises(SystemExit) as stopped:
        run(samples, **{"reference": "digits:test", "out": tmp_path / "metrics.json", **options})
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    line = printed.rstrip("\n").splitlines()[-1]
    assert line.startswith("fid/evaluate.py: error: ")
    for words in named:
        assert words in line
    assert not (tmp_path / "metrics.json").exists()
