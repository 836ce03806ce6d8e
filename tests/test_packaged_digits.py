"""The packaged digits model: what `python sample.py --model digits` gives straight after the install."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gspn_dit.weights import packaged

ROOT = Path(__file__).parents[1]


def test_the_packaged_model_is_small_and_names_no_machine():
    files = [path for path in packaged("digits").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            assert "_name_or_path" not in json.loads(path.read_text())


@pytest.mark.slow
def test_its_guided_samples_are_the_digits_asked_for(tmp_path):
    samples, metrics = tmp_path / "samples", tmp_path / "metrics.json"
    for command in (
        ["sample.py", "--model", "digits", "--num-images", "100", "--batch-size", "50", "--out", f"{samples}/"],
        ["fid/evaluate.py", "--samples", samples, "--reference", "digits:test", "--features", "digits",
         "--out", metrics],
    ):  # fmt: skip
        subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT, capture_output=True)
    scores = json.loads(metrics.read_text())
    assert scores["num_samples"] == 100
    assert scores["class_accuracy"] >= 0.95
