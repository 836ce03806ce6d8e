"""The whole path with the real Inception architecture at random weights, and weights files that must not be trusted."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import FeatureExtractorInceptionV3, feature_extractor_inceptionv3

from gspn_dit.errors import InputError
from gspn_dit.fid.evaluate import evaluate
from gspn_dit.fid.extractors import create_extractor
from gspn_dit.fid.images import open_reference, open_samples

ROOT = Path(__file__).parents[1]
COUNT = 6


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's own InceptionV3 at random weights that keep activations alive, and its file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), file)
    return network, file


def write_noise(folder, low, high, seed):
    """PNGs of 8×8 blocks of colours in [low, high); the images as uint8 (COUNT, 3, 64, 64)."""
    folder.mkdir()
    blocks = np.random.default_rng(seed).integers(low, high, (COUNT, 8, 8, 3), dtype=np.uint8)
    pixels = blocks.repeat(8, axis=1).repeat(8, axis=2)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def distance_of_few(samples, reference):
    """Fréchet distance through the small side: tr(Σ₁Σ₂)^½ is the sum of singular values of A₁A₂ᵀ, where Σ = AᵀA."""
    samples, reference = samples.double(), reference.double()
    roots = [(x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (samples, reference)]
    shift = (samples.mean(dim=0) - reference.mean(dim=0)).square().sum()
    overlap = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return (shift + roots[0].square().sum() + roots[1].square().sum() - 2 * overlap).item()


@pytest.mark.slow
def test_the_command_gives_the_fid_of_these_weights(inception, tmp_path):
    network, file = inception
    samples = write_noise(tmp_path / "samples", 0, 256, seed=1)
    reference = write_noise(tmp_path / "reference", 60, 160, seed=2)
    out = tmp_path / "metrics.json"
    options = ["--samples", tmp_path / "samples", "--reference", tmp_path / "reference", "--features", "inception"]
    command = [sys.executable, ROOT / "fid/evaluate.py", *options, "--weights", file, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} images for 2048 features" in done.stderr
    metrics = json.loads(out.read_text())

    with torch.inference_mode():
        (features, _), (reference_features, _) = network(samples), network(reference)
    assert metrics["fid"] == pytest.approx(distance_of_few(features, reference_features), rel=1e-4)
    assert metrics["fid"] > 0
    assert metrics["inception_score_splits"] == COUNT  # fewer images than the usual 10 splits: one each,
    assert metrics["inception_score"] == pytest.approx(1)  # and an image is no more diverse than itself
    assert (metrics["num_samples"], metrics["num_reference"]) == (COUNT, COUNT)
    assert metrics["reference_statistics"] == "of its images"
    assert (metrics["features"], metrics["weights"]) == ("inception", "inception.pth")
    assert metrics["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "class_accuracy" not in metrics


@pytest.mark.slow
@pytest.mark.parametrize("images", [True, False], ids=["with images", "alone"])
def test_an_adm_reference_is_its_statistics_not_its_images(inception, tmp_path, images):
    """ADM's mu and sigma are over the whole dataset; the images beside them are fewer and would give another FID."""
    network, file = inception
    samples = write_noise(tmp_path / "samples", 0, 256, seed=1)
    whole = write_noise(tmp_path / "whole", 60, 160, seed=2)
    with torch.inference_mode():
        (features, _), (whole_features, _) = network(samples), network(whole)
    few = {"arr_0": whole[:2].permute(0, 2, 3, 1).numpy()} if images else {}
    np.savez(tmp_path / "adm.npz", **few, mu=whole_features.mean(dim=0), sigma=np.cov(whole_features.T))

    reference = open_reference(str(tmp_path / "adm.npz"), (64, 64))
    metrics = evaluate(open_samples(str(tmp_path / "samples")), reference, create_extractor("inception", str(file)))
    assert metrics["fid"] == pytest.approx(distance_of_few(features, whole_features), rel=1e-3)
    assert metrics["num_reference"] is None
    assert (metrics["reference"], metrics["reference_statistics"]) == (reference.source, "mu and sigma of the file")


class Hostile:
    """A pickle that runs a command when it is opened carelessly."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_code_in_a_weights_file_is_not_run(tmp_path):
    trace = tmp_path / "was-run"
    torch.save({"fc.weight": Hostile(trace)}, tmp_path / "hostile.pth")
    with pytest.raises(InputError, match=r"hostile.pth: not a file of plain tensors"):
        create_extractor("inception", str(tmp_path / "hostile.pth"))
    assert not trace.exists()
    torch.load(tmp_path / "hostile.pth", weights_only=False)  # what torch-fidelity would have done with it
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fc.weight": torch.zeros(2, 2)}, "not torch-fidelity's InceptionV3"),
        ([torch.zeros(2)], "not a dictionary of tensors"),
        ({"epoch": 3}, "not a dictionary of tensors"),
    ],
)
def test_other_weights_are_refused_in_one_line(tmp_path, content, words):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match=words) as refused:
        create_extractor("inception", str(tmp_path / "other.pth"))
    assert "other.pth" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_one_wrong_shape_among_the_right_ones_is_refused(inception, tmp_path):
    weights = {**inception[0].state_dict(), "fc.weight": torch.zeros(1000, 2048)}
    torch.save(weights, tmp_path / "imagenet.pth")
    with pytest.raises(InputError, match=r"fc\.weight"):
        create_extractor("inception", str(tmp_path / "imagenet.pth"))


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80\x02junk"])
def test_files_that_hold_no_weights_are_refused(tmp_path, content):
    (tmp_path / "junk.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"junk.pth: not a file of plain tensors"):
        create_extractor("inception", str(tmp_path / "junk.pth"))


def test_without_weights_or_network_it_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    name = feature_extractor_inceptionv3.URL_INCEPTION_V3.rpartition("/")[2]
    unreachable = f"http://127.0.0.1:9/{name}"
    monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError) as refused:
        create_extractor("inception")
    assert f"fetch {unreachable} and put it at {tmp_path / 'checkpoints' / name}" in str(refused.value)
    assert "--weights" in str(refused.value)


@pytest.mark.slow
def test_the_file_in_the_cache_is_used(inception, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / feature_extractor_inceptionv3.URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir()
    cached.write_bytes(inception[1].read_bytes())
    extractor = create_extractor("inception")
    assert extractor.weights == cached
    assert torch.equal(extractor.network.fc.weight, inception[0].fc.weight)
