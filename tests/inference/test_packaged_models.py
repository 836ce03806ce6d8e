"""The packaged models: what `gspn-dit sample --model digits` and `photos` give straight after the install."""

import json

import pytest
import torch

from gspn_dit.__main__ import main
from gspn_dit.autoencoder.vae import load_vae, vae_sha256
from gspn_dit.inference.loading import load_pipeline
from gspn_dit.storage.files import sha256
from gspn_dit.storage.packaged import PACKAGED_CLASSIFIERS, PACKAGED_MODELS

# First digits of what stores, runs and reference files of users hold: encoder, decoder, classifier.
REMEMBERED = {
    "digits": ("566182cf7bc2", "e704154ae8fb", "3ea79038a58c"),
    "photos": ("bf00c9e26574", "9b1cf1bc9752", "94a59546c9cd"),
}


@pytest.mark.parametrize(("name", "most"), [("digits", 8e6), ("photos", 16e6)])
def test_a_packaged_model_is_small_and_names_no_machine(name, most):
    files = [path for path in PACKAGED_MODELS[name].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < most
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            assert "_name_or_path" not in json.loads(path.read_text())


@pytest.mark.parametrize("name", list(PACKAGED_MODELS))
def test_a_packaged_models_weights_are_float32_in_memory(name):
    """Whatever they are in the file."""
    pipe = load_pipeline(name)
    assert {tensor.dtype for part in (pipe.transformer, pipe.vae) for tensor in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", list(REMEMBERED))
def test_packaged_vaes_and_classifiers_stay_those_that_users_files_remember(name):
    """A store refuses another encoder, a run warns of another decoder, a reference file refuses another classifier."""
    found = vae_sha256(load_vae(name))
    assert (found["encoder"][:12], found["decoder"][:12], sha256(PACKAGED_CLASSIFIERS[name])[:12]) == REMEMBERED[name]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("digits", 100), ("photos", 16)])
def test_guided_samples_are_of_the_classes_asked_for(name, count, tmp_path):
    samples, metrics = tmp_path / "samples", tmp_path / "metrics.json"
    for argv in (
        [
            "sample",
            "--model",
            name,
            "--num-images",
            count,
            "--num-inference-steps",
            "12",
            "--batch-size",
            "50",
            "--out",
            f"{samples}/",
        ],
        ["evaluate", "--samples", samples, "--reference", f"{name}:test", "--features", name, "--out", metrics],
    ):
        main([*map(str, argv), "--device", "cpu"])
    scores = json.loads(metrics.read_text())
    assert scores["num_samples"] == count
    assert scores["class_accuracy"] >= 0.93
