"""The packaged models: what `gspn-dit sample --model digits` and `photos` give straight after the install."""

import json

import pytest

from gspn_dit.__main__ import main
from gspn_dit.storage.packaged import PACKAGED_MODELS


@pytest.mark.parametrize(("name", "most"), [("digits", 8e6), ("photos", 16e6)])
def test_a_packaged_model_is_small_and_names_no_machine(name, most):
    files = [path for path in PACKAGED_MODELS[name].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < most
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            assert "_name_or_path" not in json.loads(path.read_text())


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
