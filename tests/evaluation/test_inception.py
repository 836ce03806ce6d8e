"""The whole path with the real Inception architecture at random weights, and weights files that must not be trusted."""

import hashlib
import json
import os
import socket
import time
import warnings

import numpy as np
import pytest
import torch
import torch_fidelity
from made.inception import random_inception, write_noise
from torch_fidelity import feature_extractor_inceptionv3

from gspn_dit.commands import EvaluateOptions as Options
from gspn_dit.errors import InputError
from gspn_dit.evaluation import networks
from gspn_dit.evaluation.evaluate import evaluate, main
from gspn_dit.evaluation.extractors import create_extractor
from gspn_dit.evaluation.image_sets import open_reference, open_samples
from gspn_dit.options import command

pytestmark = pytest.mark.filterwarnings("ignore:.*(rank-deficient|so no sfid|no precision)")
COUNT = 4


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's own InceptionV3 at random weights that keep activations alive, and its file."""
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    return random_inception(file), file


@pytest.fixture(scope="module")
def sets(inception, tmp_path_factory):
    """Samples and a reference: of each its folder, its images, and torch-fidelity's features of them."""
    folder, made = tmp_path_factory.mktemp("sets"), []
    for name, low, high, seed in (("samples", 0, 256, 1), ("reference", 60, 160, 2)):
        images = write_noise(folder / name, low, high, seed, COUNT)
        with torch.inference_mode():
            made.append((folder / name, images, inception[0](images)[0]))
    return made


def distance_of_few(samples, reference):
    """Fréchet distance through the small side: tr(Σ₁Σ₂)^½ is the sum of singular values of A₁A₂ᵀ, where Σ = AᵀA."""
    samples, reference = samples.double(), reference.double()
    roots = [(x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (samples, reference)]
    shift = (samples.mean(dim=0) - reference.mean(dim=0)).square().sum()
    overlap = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return (shift + roots[0].square().sum() + roots[1].square().sum() - 2 * overlap).item()


@pytest.mark.slow
def test_the_command_gives_the_fid_of_these_weights(inception, sets, tmp_path, capsys):
    _, file = inception
    (samples, _, features), (reference, _, reference_features) = sets
    out = tmp_path / "metrics.json"
    options = {"samples": samples, "reference": reference, "features": "inception"}
    argv = [f"--{key}={value}" for key, value in {**options, "weights": file, "out": out}.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # this module's tests ignore them
        command(main, Options, prog="fid/evaluate.py", argv=argv)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1  # of few images, once for both sets and both covariances
    assert f"warning: samples: {COUNT} images for 2048 features" in said
    metrics = json.loads(out.read_text())

    assert metrics["fid"] == pytest.approx(distance_of_few(features, reference_features), rel=1e-4)
    assert metrics["fid"] > 0
    assert metrics["inception_score_splits"] == 1 and "inception_score_std" not in metrics
    assert 1.5 < metrics["inception_score"] <= COUNT
    # Fewer images than torch-fidelity's 10 splits: one each, and an image is no more diverse than itself.
    assert metrics["inception_score_torch_fidelity"] == pytest.approx(1)
    assert (metrics["num_samples"], metrics["num_reference"]) == (COUNT, COUNT)
    assert metrics["reference_statistics"] == "of its images"
    assert (metrics["features"], metrics["weights"]) == ("inception", "inception.pth")
    assert metrics["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "class_accuracy" not in metrics


@pytest.mark.slow
@pytest.mark.parametrize("images", [True, False], ids=["with images", "alone"])
def test_an_adm_reference_is_its_statistics_not_its_images(inception, sets, tmp_path, images):
    """ADM's mu and sigma are over the whole dataset; the images beside them are fewer and would give another FID."""
    (samples, _, features), (_, whole, whole_features) = sets
    few = {"arr_0": whole[:2].permute(0, 2, 3, 1).numpy()} if images else {}
    np.savez(tmp_path / "adm.npz", **few, mu=whole_features.mean(dim=0), sigma=np.cov(whole_features.T))

    reference = open_reference(str(tmp_path / "adm.npz"), (64, 64))
    metrics = evaluate(open_samples(str(samples)), reference, create_extractor("inception", str(inception[1])))
    assert metrics["fid"] == pytest.approx(distance_of_few(features, whole_features), rel=1e-3)
    assert "sfid" not in metrics  # there are no mu_s and sigma_s, and
    assert "precision" not in metrics  # two images are too few to have neighbours
    assert metrics["num_reference"] is None
    assert (metrics["reference"], metrics["reference_statistics"]) == (reference.source, "mu and sigma of the file")


@pytest.mark.slow
def test_the_figures_are_those_of_torch_fidelity(inception, tmp_path):
    write_noise(tmp_path / "samples", 0, 256, seed=1, count=11)
    write_noise(tmp_path / "reference", 0, 100, seed=2, count=12)
    samples, reference = str(tmp_path / "samples"), str(tmp_path / "reference")
    metrics = evaluate(open_samples(samples), open_samples(reference), create_extractor("inception", inception[1]))
    common = dict(
        input1=samples,
        input2=reference,
        feature_extractor="gspn-dit-inception",
        batch_size=1,
        cache=True,  # of features, which the second call finds
        cache_root=str(tmp_path / "cache"),
        input1_cache_name="samples",
        feature_extractor_weights_path=inception[1],
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )
    # Its FID of 2048 features takes half a minute; demo/test_digits.py compares that of 64.
    expected = torch_fidelity.calculate_metrics(isc=True, prc=True, **common)
    assert metrics["inception_score_torch_fidelity"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert metrics["inception_score_torch_fidelity_std"] == pytest.approx(expected["inception_score_std"], rel=1e-6)
    assert metrics["precision"] == pytest.approx(expected["precision"], rel=1e-6)
    assert metrics["recall"] == pytest.approx(expected["recall"], rel=1e-6)
    # ADM's splits of 5000 are one split here, of images as they come.
    whole = torch_fidelity.calculate_metrics(isc=True, isc_splits=1, samples_shuffle=False, **common)
    assert metrics["inception_score"] == pytest.approx(whole["inception_score_mean"], rel=1e-6)
    assert metrics["inception_score"] > 1.5


@pytest.mark.slow
def test_spatial_features_are_the_first_channels_of_mixed_6_before_pooling(inception, tmp_path):
    """ADM's tensor mixed_6/conv:0 is (N, 17, 17, 192) and comes after batch norm and ReLU; 7 channels are kept."""
    network, file = inception
    images = write_noise(tmp_path / "images", 0, 256, seed=3, count=2)
    maps = []
    hook = network.Mixed_6d.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.inference_mode():
        features, logits = network(images)
    hook.remove()
    assert maps[0].shape == (2, 768, 17, 17)
    assert network.Mixed_6d.branch1x1.conv.out_channels == 192

    layers = create_extractor("inception", str(file))(images)
    assert layers["mixed_6"].shape == (2, 2023)
    as_channels_last = maps[0][:, :7].permute(0, 2, 3, 1)  # the order of a TensorFlow array
    torch.testing.assert_close(layers["mixed_6"].view(2, 17, 17, 7), as_channels_last)
    assert layers["mixed_6"].min() == 0 < layers["mixed_6"].max()  # rectified, and not dead
    torch.testing.assert_close(layers["2048"], features)
    torch.testing.assert_close(layers["logits_unbiased"], logits)


class Hostile:
    """A pickle that runs a command when it is opened carelessly."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_code_in_a_weights_file_is_not_run(tmp_path):
    trace = tmp_path / "was-run"
    torch.save({"fc.weight": Hostile(trace)}, tmp_path / "hostile.pth")
    with pytest.raises(InputError, match=r"hostile.pth': not a file of plain tensors"):
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
    with pytest.raises(InputError, match=r"junk.pth': not a file of plain tensors"):
        create_extractor("inception", str(tmp_path / "junk.pth"))


def test_without_weights_or_network_it_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    name = feature_extractor_inceptionv3.URL_INCEPTION_V3.rpartition("/")[2]
    unreachable = f"http://127.0.0.1:9/{name}"
    monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError) as refused:
        create_extractor("inception")
    assert f"fetch {unreachable} and put it at {tmp_path / 'checkpoints' / name}" in str(refused.value)
    assert "127.0.0.1 cannot be reached" in str(refused.value) and "--weights" in str(refused.value)


def test_a_server_that_says_nothing_is_not_waited_for(tmp_path, monkeypatch):
    """As where a firewall drops packets: the connection may come about, and no answer comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"http://127.0.0.1:{server.getsockname()[1]}/weights-0123.pth"
        monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", silent)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        monkeypatch.setattr(networks, "SILENCE", 0.2)
        start = time.monotonic()
        with pytest.raises(InputError, match=r"127\.0\.0\.1 cannot be reached \(.*timed out\).*--weights"):
            create_extractor("inception")
        assert time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None


@pytest.mark.slow
def test_the_file_in_the_cache_is_used(inception, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / feature_extractor_inceptionv3.URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir()
    cached.write_bytes(inception[1].read_bytes())
    extractor = create_extractor("inception")
    assert extractor.weights == cached
    assert torch.equal(extractor.network.fc.weight, inception[0].fc.weight)
