"""benchmarks/classifier_throughput.py: whose models it times, and what it writes."""

import re

import pytest

from benchmarks.classifier_throughput import Options, macs_of, main, make_model
from gspn_dit.errors import InputError


@pytest.mark.slow
def test_models_of_both_packages_are_in_one_table(tmp_path):
    names = ["gspn-grouped-pico", "test_convnext"]
    main(Options(names=names, image_sizes=[32, 64], batch_size=2, repeats=2, out=str(tmp_path / "out.md")))
    text = (tmp_path / "out.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| " in line]
    rows = [row for row in rows if row[0] in names]
    assert [row[0] for row in rows] == names * 2
    assert all(float(row[column]) > 0 for row in rows for column in (1, 2, 3, 5))
    assert rows[1][4] == rows[1][6] == "1.00×"
    assert float(rows[2][2]) > 3 * float(rows[0][2])
    assert "threads, torch" in text and "Code: " in text


def test_multiplications_of_timms_models_are_counted_as_ours():
    """A convolution counts its products: those of a stem of 4 × 4 pixels a step are an exact part of the whole."""
    model = make_model("test_convnext", 64)
    stem = model.stem[0]
    products = stem.weight.numel() * (64 // stem.stride[0]) ** 2
    assert products < macs_of("test_convnext", 64) == pytest.approx(macs_of("test_convnext", 128) / 4, rel=0.02)


def test_a_model_of_nobody_is_refused(tmp_path):
    with pytest.raises(InputError, match=re.escape("names='swine_tiny': is no classifier of this package or of timm")):
        main(Options(names=["swine_tiny"], out=str(tmp_path / "out.md")))
    assert not (tmp_path / "out.md").exists()
