"""The operator's table for a GPU: its order, what is left of a run that is cut short, and its rows, without a GPU."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import operator_cuda, scan_cases
from benchmarks.kernels import short_name
from benchmarks.operator_cuda import PerLine, measure, measure_peers, run_cases
from benchmarks.scan_cases import Case
from benchmarks.timing import Timing
from gspn_dit.ops import propagate

SMALL = Case("small", 2, 8, 128, 2, None, dtype=torch.float32)


@pytest.fixture
def card(monkeypatch):
    """A card of that name, on which nothing is measured; calls of the three stages are noted."""
    asked = []

    def stage(name, figures):
        def find(case, *arguments):
            asked.append((name, case.key))
            return figures

        monkeypatch.setattr(operator_cuda, name, find)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "A Card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(operator_cuda, "copy_bandwidth", lambda repeats: 1e12)
    monkeypatch.setattr(operator_cuda, "markdown", lambda figures: "| a row |")
    monkeypatch.setattr(operator_cuda, "cases", lambda: [Case("one", 1, 1, 1, 1, None), Case("two", 1, 1, 1, 1, 2)])
    monkeypatch.setattr(operator_cuda, "revision", lambda: "abc1234")
    stage("measure", {"ours": 1})
    stage("measure_peers", {"per_line": 2})
    stage("kernel_names", {"kernels": 3})
    return asked


def saved(folder):
    return json.loads((folder / "operator-cuda.json").read_text())


def test_ours_is_measured_for_all_cases_before_any_slower_peer(card, tmp_path):
    run_cases(tmp_path, 1)
    keys = ["one, global", "two, chunk 2"]
    assert card == [(name, key) for name in ("measure", "measure_peers", "kernel_names") for key in keys]
    assert saved(tmp_path)["rows"] == {key: {"ours": 1, "per_line": 2, "kernels": 3} for key in keys}
    written = (tmp_path / "operator-cuda.md").read_text()
    assert saved(tmp_path)["revision"] == "abc1234"
    assert saved(tmp_path)["machine"] == f"A Card, torch {torch.__version__}" and saved(tmp_path)["machine"] in written


def test_a_run_that_is_cut_goes_on_unless_the_code_is_another(card, tmp_path, monkeypatch):
    def cut(case, *arguments):
        if case.name == "two":
            raise KeyboardInterrupt
        return {"ours": 1}

    measure = operator_cuda.measure
    monkeypatch.setattr(operator_cuda, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        run_cases(tmp_path, 1)
    assert saved(tmp_path)["rows"] == {"one, global": {"ours": 1}}
    monkeypatch.setattr(operator_cuda, "measure", measure)
    run_cases(tmp_path, 1)
    assert [key for name, key in card if name == "measure"] == ["two, chunk 2"]
    for revision in ("def5678", "def5678 with changes", "def5678 with changes"):  # which no commit names twice
        card.clear()
        monkeypatch.setattr(operator_cuda, "revision", lambda revision=revision: revision)
        run_cases(tmp_path, 1)
        assert len(card) == 6


def test_a_case_that_fails_is_named_and_tried_again_and_the_others_are_kept(card, tmp_path, monkeypatch):
    measure = operator_cuda.measure

    def fail(case, *arguments):
        if case.name == "one":
            raise RuntimeError("no room\nfor it")
        return measure(case)

    monkeypatch.setattr(operator_cuda, "measure", fail)
    with pytest.raises(SystemExit, match="1 cases failed: one, global"):
        run_cases(tmp_path, 1)
    assert "| **one, global: FAILED** | RuntimeError: no room |" in (tmp_path / "operator-cuda.md").read_text()
    card.clear()
    monkeypatch.setattr(operator_cuda, "measure", measure)
    run_cases(tmp_path, 1)
    assert [key for _, key in card] == ["one, global"] * 3
    assert "FAILED" not in (tmp_path / "operator-cuda.md").read_text()


class NotCompiled(PerLine):
    def time(self, case, repeats):
        raise OSError("no nvcc")


@pytest.fixture
def without_a_gpu(monkeypatch):
    """The CPU in a GPU's place, the reference in the kernels', and a millisecond for every call."""

    def timed(calls, repeats, graphs=True):
        for call in calls:
            call()
        return Timing(1.0, 2.0, graphs)

    def run(*arguments, backend, **options):
        return propagate(*arguments, **options, backend="reference")

    for module in (operator_cuda, scan_cases):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(operator_cuda, "timed", timed)
    monkeypatch.setattr(scan_cases, "propagate", run)
    monkeypatch.setattr(operator_cuda, "input_sets", lambda make: [make(), make()])
    monkeypatch.setattr(operator_cuda, "peak_bytes", lambda device, call: 10**9)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.skipif("direct" not in inspect.signature(propagate).parameters, reason="the operator has no direct path")
@pytest.mark.parametrize("case", [replace(SMALL, tail=True), replace(SMALL, tail=True, factors=False)])
def test_norm_and_direct_path_are_compared_with_their_reference(case):
    figures = measure(case, bandwidth=1e12, repeats=1)
    assert set(figures["errors"]) == {"y", "x", "gates and λ", "d", *("f", "s") * case.factors}
    assert all(error < 1e-5 for error in figures["errors"].values())


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, groups=128, factors=False), replace(SMALL, trains=False)])
def test_a_row_has_its_share_of_the_floor_and_its_peers(case):
    figures = measure(case, bandwidth=case.floor_bytes / 1e-4, repeats=1)
    assert figures["floor_ms"] == pytest.approx(0.1)
    assert all(error < 1e-5 for error in figures["errors"].values())
    assert figures["attention"]["flash"]["forward"]["device_ms"] == 1.0
    cells = [cell.strip() for cell in operator_cuda.markdown(figures).strip("|").split("|")]
    assert len(cells) == len(operator_cuda.COLUMNS)
    row = dict(zip(operator_cuda.COLUMNS, cells, strict=True))
    assert row["fraction"] == "10%" and row["× attention"] == "1.0 (flash)"
    assert row["over forward"] == ("1.0" if case.trains else "–") and row["× reference"] == "–"
    figures |= measure_peers(case, NotCompiled(), 1)
    assert figures["per_line"] == {"error": "no nvcc"}
    assert "| 1.0 (eager) |" in operator_cuda.markdown(figures)


def test_cases_have_names_of_their_own_and_what_has_a_target_comes_first():
    keys = [case.key for case in scan_cases.cases()]
    assert len(set(keys)) == len(keys)
    assert keys[:7] == [
        "256 px, global",
        "512 px, global",
        "1024 px, global",
        "2048 px, global",
        "16K px, chunk 32",
        "16K px, global",
        "GSPN-2: 1024², 8 ch, global",
    ]


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void gspn::map_forward<gspn::BFloat16, true, gspn::Lanes<16, 4>, false>(gspn::Forward<X>)", "map_forward"),
        ("void (anonymous namespace)::walk<float>(int)", "walk"),
        ("at::native::vectorized_elementwise_kernel<4, at::native::F>(int)", "vectorized_elementwise_kernel"),
        ("triton_red_fused_add_mul_0", "triton_red_fused_add_mul_0"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_a_kernel_is_called_by_its_function(kernel, name):
    assert short_name(kernel) == name
