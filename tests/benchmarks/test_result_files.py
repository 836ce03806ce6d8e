"""Every result file names the revision of the code and the machine; every benchmark answers a typo at once."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import block_budget, depthwise, operator, operator_cpu, result_files, revision, store
from benchmarks.commands import BENCHMARKS
from benchmarks.machine import machine
from benchmarks.tables import figure, header, ratio, row

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("benchmarks/*.py"))


@pytest.fixture
def of_a_revision(monkeypatch):
    monkeypatch.setattr(result_files, "revision", lambda: "abc1234 with changes")


def with_nothing_measured(monkeypatch, name, out):
    """Run a benchmark that writes one report, its figures left out."""
    monkeypatch.setattr(operator_cpu, "tables", lambda repeats: ["a table"])
    monkeypatch.setattr(operator, "find", lambda name: SimpleNamespace(status=lambda: (True, "")))
    monkeypatch.setattr(block_budget, "tables", lambda options: ["a table"])
    monkeypatch.setattr(depthwise, "rows", lambda options, pixels: ["a row"])
    monkeypatch.setattr(store, "make_store", lambda *arguments: None)
    monkeypatch.setattr(store, "opening_rows", lambda *arguments: ["a table"])
    monkeypatch.setattr(store, "speed_rows", lambda *arguments: ["a table"])
    importlib.import_module(f"benchmarks.{name}").main(BENCHMARKS[name].options(out=str(out)))


@pytest.mark.usefixtures("of_a_revision")
@pytest.mark.parametrize("name", ["operator", "block_budget", "depthwise", "store"])
def test_a_report_names_revision_and_machine(monkeypatch, tmp_path, capsys, name):
    out = tmp_path / "report.md"
    with_nothing_measured(monkeypatch, name, out)
    written = out.read_text()
    assert written == capsys.readouterr().out
    assert "Code: abc1234 with changes." in written and f"torch {torch.__version__}" in written
    assert machine().partition(",")[0] in written


def test_a_table_of_several_runs_names_the_revision_of_each_row(monkeypatch, tmp_path):
    rows = {"oldest": {"ms": 1.0}}
    for name in ("abc1234", "def5678"):
        monkeypatch.setattr(result_files, "revision", lambda name=name: name)
        rows[name] = result_files.noted({"ms": 1.0})
    assert [each.get("revision") for each in rows.values()] == [None, "abc1234", "def5678"]
    assert result_files.origin("A Card", rows.values()) == ["A Card", "", "Code: abc1234, def5678, not noted."]
    path = tmp_path / "table.json"
    result_files.write_rows(path, {"machine": "A Card"}, rows)
    assert result_files.saved_rows(path, {"machine": "A Card"}) == rows


def test_only_the_module_of_result_files_writes_them():
    """So that no benchmark leaves out what it names; results of a training and higher's calls are rows."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None))
            if named in ("write_text", "write_json", "write_bytes", "dump"):
                module = isinstance(node.func, ast.Name) and named == "write_text"
                found |= set() if module else {path.name}
    cells = {"classification.py", "classification_cell.py", "distillation_cell.py", "quality_cell.py"}
    assert found == cells | {"higher_case.py", "memory.py", "result_files.py", "store.py"}


@pytest.mark.parametrize("change", [False, True])
def test_the_revision_is_the_commit_and_says_if_code_differs(monkeypatch, tmp_path, change):
    def git(*words):
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        return subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True)

    monkeypatch.setattr(revision, "ROOT", tmp_path.resolve())
    for file in ("gspn_dit/a.py", "benchmarks/results/old.md", "docs/a.md"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    (tmp_path / "benchmarks/results/new.md").write_text("what a benchmark has written is no change of the code")
    (tmp_path / "docs/a.md").write_text("nor is prose")
    if change:
        (tmp_path / "gspn_dit/new.py").write_text("but this is")
    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    assert revision.revision.__wrapped__() == (f"{commit} with changes" if change else commit)


def test_without_a_checkout_the_revision_says_so_or_what_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(revision, "ROOT", tmp_path)
    monkeypatch.delenv(revision.VARIABLE, raising=False)
    assert revision.revision.__wrapped__().endswith("no git checkout")
    monkeypatch.setattr(revision.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("git")))
    assert revision.revision.__wrapped__().endswith("no git checkout")
    monkeypatch.setenv(revision.VARIABLE, "abc1234")
    assert revision.revision.__wrapped__() == "abc1234"


def test_no_benchmark_imports_another_ones_functions():
    """A benchmark is a file that is run, with those of its own name (operator_cuda.py, quality_report.py)."""
    for path in FILES:
        own = next((name for name in BENCHMARKS if path.stem.startswith(name)), path.stem)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks"):
                part = node.module.removeprefix("benchmarks").removeprefix(".")
                for module in [part] if part else [alias.name for alias in node.names]:
                    others = [name for name in BENCHMARKS if module.startswith(name)]
                    assert not others or own in others, f"{path.name}: {module}"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_typo_is_answered_before_torch_is_imported(name):
    code = (
        f"import runpy, sys\nsys.argv = ['x', '--outt', 'a']\n"
        f"try:\n    runpy.run_module('benchmarks.{name}', run_name='__main__')\n"
        f"except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert f"python -m benchmarks.{name}: error: --outt: no such option" in done.stderr


def test_options_of_every_benchmark_are_those_of_its_module():
    for name, benchmark in BENCHMARKS.items():
        assert importlib.import_module(f"benchmarks.{name}").Options is benchmark.options
        assert "out" in {field.name for field in dataclasses.fields(benchmark.options)}


def test_tables():
    assert [*header(["a", "b"]), row([1, None])] == ["| a | b |", "|---|---|", "| 1 | None |"]
    one, two = {"seconds": 1.0, "whole": True}, {"seconds": 0.25, "whole": False}
    assert [figure(one, "seconds", 1e3), figure(two, "seconds", 1e3), figure(None, "seconds", 1)] == [
        "1000",
        "~250",
        "–",
    ]
    assert figure({"error": "out of memory"}, "seconds", 1) == "out of memory"
    assert (ratio(one, two), ratio(one, one), ratio(one, None)) == ("~4.00×", "1.00×", "–")
