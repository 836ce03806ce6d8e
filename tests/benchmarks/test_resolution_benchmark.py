"""benchmarks/resolution.py: what becomes of its cases, without measuring any."""

import pytest
import torch

from benchmarks import resolution
from benchmarks.resolution import STEPS, CaseFailed, Options, main
from benchmarks.resolution_case import Case, call_of, measure, model_of


@pytest.fixture
def asked(monkeypatch):
    """The cases that are measured: each as many milliseconds as 64 go into its pixels, twice that if compiled."""
    cases = []

    def run_case(case, seconds):
        cases.append(case)
        return {"seconds": 1e-3 * case.pixels / 64 * (1 + case.compiled), "bytes": 10**6, "whole": True}

    monkeypatch.setattr(resolution, "run_case", run_case)
    monkeypatch.setattr(resolution, "plot", lambda results, path: path.touch())
    return cases


def test_a_case_that_fails_is_named_and_tried_again_and_the_others_are_kept(tmp_path, monkeypatch, asked, capsys):
    measured = resolution.run_case

    def run_case(case, seconds):
        if case.model == "DiT":
            raise CaseFailed("no engine")
        return measured(case, seconds)

    monkeypatch.setattr(resolution, "run_case", run_case)
    options = Options(pixels=[256, 64], dtypes=["float32"], out=str(tmp_path / "table"))
    with pytest.raises(SystemExit, match="cases failed: DiT, forward, 256 px"):
        main(options)
    assert "no engine" in capsys.readouterr().out and "DiT" not in {case.model for case in asked}
    asked.clear()
    monkeypatch.setattr(resolution, "run_case", measured)
    main(options)
    assert {case.model for case in asked} == {"DiT"}
    sizes = [row.split("|")[2].strip() for row in (tmp_path / "table.md").read_text().splitlines() if "px |" in row]
    assert sizes == ["64 px", "256 px"] * 2


def test_what_has_a_target_comes_first_and_the_faster_setting_is_used_at_all_sizes(tmp_path, asked):
    main(Options(pixels=[64, 1024, 256], dtypes=["float32"], out=str(tmp_path / "table")))
    order = [(case.model, case.step, case.pixels, case.compiled) for case in asked]
    assert len(set(order)) == len(order)
    pair = ("GSPN-DiT", "DiT")
    trials = [(model, step, 256, compiled) for step in STEPS for model in pair for compiled in (False, True)]
    rest = [("forward", 1024), ("training", 1024), ("forward", 64), ("training", 64)]
    assert order[: len(trials) + 8] == trials + [(model, *case, False) for case in rest for model in pair]
    assert {model for model, *_ in order[len(trials) + 8 :]} == {"linear attention", "window attention"}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("model", ["DiT", "GSPN-DiT"])
@pytest.mark.parametrize("pixels", [256, 64])
def test_the_stream_of_both_models_is_bfloat16(model, step, pixels):
    """At the size that the model is made for, and at another, for which DiT computes its positions."""
    name = {"DiT": "dit-ti-2", "GSPN-DiT": "gspn-dit-ti-2"}[model]
    case = Case(model, name, step, pixels, 1, "bfloat16", False, overrides={"depth": 2})
    network, types = model_of(case), []
    network.blocks[0].register_forward_hook(lambda block, inputs, y: types.extend([inputs[0].dtype, y.dtype]))
    call_of(case, network)()
    assert types == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    ("overrides", "aligned", "shifted"),
    [
        ({"mixer": "window", "depth": 5}, "chunk the map", "chunk the map, shifted"),
        ({"chunk": 2, "depth": 5, "global_layers": 0}, "window 2", "window 2, shifted"),
    ],
)
def test_blocks_whose_windows_are_shifted_are_counted_by_themselves(overrides, aligned, shifted):
    case = Case(
        "GSPN-DiT",
        "gspn-dit-ti-2",
        "forward",
        64,
        1,
        "float32",
        False,
        repeats=1,
        overrides=overrides,
    )
    measured = measure(case)
    assert set(measured["parts"]) == {"ends", aligned, shifted}
    parts = {kind: part["seconds"] for kind, part in measured["parts"].items()}
    expected = 3 * parts[aligned] + 2 * parts[shifted] - 4 * parts["ends"]
    assert measured["by_blocks"]["seconds"] == pytest.approx(expected)
