"""Reference files in ADM's format: made, read back, and shared out over processes."""

import json
import re
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from made.inception import random_inception, write_noise
from made.launched import run_warm

from gspn_dit.autoencoder import decode, load_vae, sample_posterior
from gspn_dit.commands import EncodeOptions
from gspn_dit.commands import EvaluateOptions as ScoreOptions
from gspn_dit.commands import ReferenceOptions as Options
from gspn_dit.data import LatentStore, encode, open_images
from gspn_dit.errors import InputError
from gspn_dit.evaluation.evaluate import evaluate
from gspn_dit.evaluation.evaluate import main as score
from gspn_dit.evaluation.extractors import create_extractor
from gspn_dit.evaluation.image_sets import open_reference, open_samples
from gspn_dit.evaluation.moments import Statistics
from gspn_dit.evaluation.npz import Notes, read_images, read_notes, write_reference
from gspn_dit.evaluation.reference import choose, main, open_data
from gspn_dit.options import command

pytestmark = pytest.mark.filterwarnings("ignore:.*(rank-deficient|so no sfid|no precision)")
COUNT = 8
KEPT = 5
NOTES = Notes("inception", "0" * 64, None)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    return random_inception(file), file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "reference"
    write_noise(folder, 0, 200, seed=1, count=COUNT)
    return folder


@pytest.fixture(scope="module")
def reference(inception, folder, tmp_path_factory):
    """A reference file of the folder, by one process of one thread, and what it printed on the way."""
    file = tmp_path_factory.mktemp("reference") / "new" / "reference.npz"
    with one_thread(), pytest.warns(UserWarning, match=f"data: {COUNT} images for 2048 features") as warned:
        main(Options(data=str(folder), out=str(file), num_images=KEPT, weights=str(inception[1]), device="cpu"))
    assert len(warned) == 1
    return file


class one_thread:
    """As each of several processes has: the order of float32 sums may depend on it."""

    def __enter__(self):
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_):
        torch.set_num_threads(self.threads)


@pytest.mark.slow
def test_a_reference_file_holds_statistics_of_all_images_and_some_of_them(inception, folder, reference):
    with np.load(reference) as arrays:
        shapes = {name: (arrays[name].dtype, arrays[name].shape) for name in arrays}
        found = dict(arrays)
    assert [shapes.pop(name)[1] for name in ("features", "weights_sha256")] == [(), ()]
    assert shapes == {
        "arr_0": (np.uint8, (KEPT, 64, 64, 3)),
        "mu": (np.float64, (2048,)),
        "sigma": (np.float64, (2048, 2048)),
        "mu_s": (np.float64, (2023,)),
        "sigma_s": (np.float64, (2023, 2023)),
    }
    images = open_samples(str(folder))
    chosen = choose(COUNT, KEPT, seed=0)
    assert chosen == sorted(set(chosen)) and chosen != choose(COUNT, KEPT, seed=1)
    np.testing.assert_array_equal(found["arr_0"], torch.stack([images.read(i) for i in chosen]).permute(0, 2, 3, 1))
    everything = torch.stack([images.read(i) for i in range(COUNT)])
    layers = create_extractor("inception", inception[1])(everything)
    for name, layer in (("mu", "2048"), ("mu_s", "mixed_6")):
        np.testing.assert_allclose(found[name], layers[layer].double().mean(dim=0), rtol=1e-5, atol=1e-6)
        covariance = np.cov(layers[layer].double().numpy(), rowvar=False)
        assert np.abs(found[name.replace("mu", "sigma")] - covariance).max() < 1e-5 * np.abs(covariance).max()


@pytest.mark.slow
def test_scoring_against_the_file_is_scoring_against_its_images(inception, folder, reference, tmp_path):
    write_noise(tmp_path / "samples", 0, 256, seed=2, count=6)
    samples = open_samples(str(tmp_path / "samples"))
    extractor = create_extractor("inception", inception[1])
    from_file = evaluate(samples, open_reference(str(reference), (64, 64)), extractor)
    from_images = evaluate(samples, open_samples(str(folder)), extractor)
    assert from_file["fid"] == pytest.approx(from_images["fid"], rel=1e-5)
    assert from_file["sfid"] == pytest.approx(from_images["sfid"], rel=1e-5)
    assert (from_file["precision_recall_reference"], from_images["precision_recall_reference"]) == (KEPT, COUNT)
    assert from_file["precision"] <= from_images["precision"]  # more of the same images: a larger manifold


def test_a_classifiers_statistics_are_its_images_and_say_whose_they_are(tmp_path):
    dataset = open_images("digits", 32, split="test")
    images, labels = zip(*(dataset[i] for i in range(0, 500, 5)), strict=True)
    pixels = torch.stack(images).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", arr_0=pixels, labels=np.array(labels))
    file, extractor = tmp_path / "digits.npz", create_extractor("digits")
    main(Options(data="digits:test", out=str(file), features="digits", num_images=KEPT))
    assert read_notes(file, "reference") == Notes("digits", extractor.weights_sha256, dataset.class_names)
    samples = open_samples(str(tmp_path / "samples.npz"))
    from_file = evaluate(samples, open_reference(str(file), (32, 32)), extractor)
    from_images = evaluate(samples, open_reference("digits:test", (32, 32)), extractor)
    assert from_file["fd"] == pytest.approx(from_images["fd"], rel=1e-9)
    assert from_file["class_accuracy"] == from_images["class_accuracy"] > 0.9
    assert from_file["reference_statistics"] == "mu and sigma of the file"
    assert from_file["precision_recall_reference"] == KEPT and "sfid" not in from_file
    with pytest.raises(InputError, match=r"its mu and sigma are of features=digits, not of features=photos"):
        evaluate(samples, open_reference(str(file), (32, 32)), create_extractor("photos"))


@pytest.mark.slow
def test_two_processes_make_the_reference_and_the_figures_of_one(tmp_path):
    dataset = open_images("digits", 32, split="test")
    images, labels = zip(*(dataset[i] for i in range(0, 500, 3)), strict=True)
    arrays = {"arr_0": torch.stack(images).permute(0, 2, 3, 1).numpy(), "labels": np.array(labels)}
    np.savez_compressed(tmp_path / "samples.npz", **arrays)

    def options(name):
        made = {"data": "digits:test", "features": "digits", "num-images": KEPT, "out": tmp_path / f"{name}.npz"}
        scored = {"samples": tmp_path / "samples.npz", "reference": "digits:test", "features": "digits"}
        both = (made, {**scored, "out": tmp_path / f"{name}.json"})
        return [[f"--{key}={value}" for key, value in each.items()] for each in both]

    logs, launcher = tmp_path / "logs", ["--multi_gpu", "--log_dir", tmp_path / "logs", "--tee", 1]
    run_warm(2, Path(__file__).parents[1] / "made" / "score_many.py", json.dumps(options("two")), launcher=launcher)
    printed = {file.parent.name: file.read_text() for file in logs.glob("*/attempt_0/*/stdout.log")}
    assert sorted(printed) == ["0", "1"]
    first, second = (re.sub(r"^\[Gloo\].*\n", "", printed[rank], flags=re.M) for rank in "01")  # older torch's own
    with one_thread():
        for (main_of, kind), argv in zip(((main, Options), (score, ScoreOptions)), options("one"), strict=True):
            command(main_of, kind, prog="here", argv=argv)

    said, _, figures = first.partition("\n")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert "statistics of 500 images" in said and json.loads(figures) == two and second == ""  # one of them prints
    with np.load(tmp_path / "one.npz") as one_file, np.load(tmp_path / "two.npz") as two_file:
        assert one_file.files == two_file.files
        for name in ("mu", "sigma"):
            assert np.abs(one_file[name] - two_file[name]).max() <= 1e-13 * np.abs(one_file[name]).max()
        np.testing.assert_array_equal(one_file["arr_0"], two_file["arr_0"])
    assert {"fd", "classifier_score", "precision", "recall", "class_accuracy"} <= set(two)
    assert set(one) == set(two)
    for key, value in two.items():
        assert value == (pytest.approx(one[key], rel=1e-10) if isinstance(value, float) else one[key]), key


def test_a_stores_images_are_its_vaes_pictures(tmp_path):
    pixels = write_noise(tmp_path / "data" / "class", 0, 256, seed=4, count=10)
    encode.main(
        EncodeOptions(
            data=str(tmp_path / "data"), vae="digits", image_size=64, out=str(tmp_path / "store"), num_workers=0
        )
    )
    images = open_data(Options(data=str(tmp_path / "store"), out="x.npz"), torch.device("cpu"))
    assert (len(images), images.image_size) == (10, (64, 64))
    vae, store = load_vae("digits"), LatentStore(tmp_path / "store")
    pictures = decode(vae, sample_posterior(store, store.moments(3)[None], torch.zeros(())))
    torch.testing.assert_close(images.read(3)[None], pictures, atol=1, rtol=0)
    torch.testing.assert_close(images.batch([3, 9], None)[:1], pictures, atol=1, rtol=0)
    assert pixels.shape[1:] == images.read(0).shape
    vae.encoder.conv_in.bias.add_(1)
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"^vae=.*other': its weights are not those that .*store was encoded with"):
        open_data(Options(data=str(tmp_path / "store"), out="x.npz", vae=str(tmp_path / "other")), torch.device("cpu"))


def statistics(width):
    return Statistics(np.arange(width, dtype=np.float64), np.eye(width))


def test_images_are_written_as_they_come_and_read_from_where_they_are(tmp_path):
    """200 MB of images are never in memory together; the covariances are 32 MB each."""
    shape = (1024, 256, 256, 3)

    def batches():
        for i in range(0, 1024, 32):
            yield np.full((32, 256, 256, 3), i // 32, dtype=np.uint8)

    tracemalloc.start()
    write_reference(tmp_path / "reference.npz", batches(), shape, statistics(2048), statistics(2023), NOTES)
    images, labels = read_images(tmp_path / "reference.npz", "samples")
    assert images.shape == shape and labels is None
    assert all((images[i] == i // 32).all() for i in (0, 31, 32, 1023))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 120e6, peak
    with np.load(tmp_path / "reference.npz") as arrays:  # numpy agrees
        assert (arrays["arr_0"][::32, 0, 0, 0] == np.arange(32)).all()
        np.testing.assert_array_equal(arrays["mu_s"], np.arange(2023))


def test_a_file_that_could_not_be_finished_is_not_there(tmp_path):
    (tmp_path / "reference.npz").write_bytes(b"the one before")

    def broken():
        yield np.zeros((2, 8, 8, 3), dtype=np.uint8)
        raise InputError("1.png: not a readable image")

    with pytest.raises(InputError, match="not a readable image"):
        write_reference(tmp_path / "reference.npz", broken(), (4, 8, 8, 3), statistics(2048), statistics(2023), NOTES)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]
    assert (tmp_path / "reference.npz").read_bytes() == b"the one before"


def test_the_same_reference_is_the_same_file(tmp_path):
    for name in ("a", "b"):
        batch = [np.ones((2, 8, 8, 3), dtype=np.uint8)]
        write_reference(tmp_path / f"{name}.npz", batch, (2, 8, 8, 3), statistics(2048), statistics(2023), NOTES)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


def test_a_disk_without_room_is_seen_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_500_000))
    options = Options(data="digits:test", out=str(tmp_path / "reference.npz"), features="digits")
    with pytest.raises(InputError, match=r"reference\.npz.*1\.6 MB are to be written.*room for 1\.5 MB"):
        main(options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"data": "nowhere"}, ["data='nowhere'", "no such folder"]),
        ({"data": "nowhere", "image-size": 64}, ["data='nowhere'", "no such folder"]),
        ({"data": "digits", "image-size": 64}, ["image-size=64", "32"]),
        ({"data": "photos"}, ["--image-size: missing", "photos"]),
        ({"data": "digits:test", "num-images": 501}, ["num-images=501", "500"]),
        ({"data": "digits", "num-images": 0}, ["num-images=0"]),
        ({"data": "digits", "seed": -1}, ["seed=-1"]),
        ({"data": "digits", "vae": "digits"}, ["vae='digits'", "no latent store"]),
        ({"data": "digits", "out": "reference.zip"}, ["out='reference.zip'", ".npz"]),
        ({"data": "digits", "weights": "nowhere.pth"}, ["weights='nowhere.pth'", "no such file"]),
        ({"data": "digits", "features": "clip"}, ["features='clip'", "inception, digits or photos"]),
        ({"data": "photos:test", "image-size": 64, "features": "digits"}, ["data='photos:test'", "64x64", "32x32"]),
    ],
)
def test_bad_options_end_the_command_in_one_line(tmp_path, capsys, options, named):
    options = {"out": str(tmp_path / "reference.npz"), **options}
    with pytest.raises(SystemExit) as stopped:
        command(
            main,
            Options,
            prog="fid/reference.py",
            argv=[f"--{key}={value}" for key, value in options.items()],
        )
    assert stopped.value.code == 2
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert line.startswith("fid/reference.py: error: ")
    assert all(words in line for words in named), line
    assert not list(tmp_path.iterdir())
