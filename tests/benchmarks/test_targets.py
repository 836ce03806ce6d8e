"""benchmarks/targets.py: every target is measured from the files that the benchmarks write, or said not to be."""

from __future__ import annotations

import json

import pytest
import yaml

from benchmarks import scan_cases
from benchmarks.commands import ResolutionOptions, TextToImageOptions
from benchmarks.resolution import FIRST, batch_of
from benchmarks.resolution_case import Case
from benchmarks.targets import FIGURES, Options, main, table, targets


def timing(ms):
    return {"device_ms": ms, "eager_ms": ms, "captured": True}


def operator_row(forward, both):
    attention = {"flash": {"forward": timing(4.0)}, "cuDNN": {"forward": timing(3.0)}, "other": {"error": "none"}}
    ours = {"forward": timing(forward)} | ({"both": timing(both)} if both else {})
    return {"floor_ms": 0.5, "ours": ours, "attention": attention}


def model_rows(step, pixels, **seconds):
    """Rows of both models: eager, and compiled in half the time; a step adds as many bytes as it takes seconds."""
    rows = {}
    for model, name in (("GSPN-DiT", "ours"), ("DiT", "dit")):
        for compiled in (False, True):
            case = Case(model, "xl", step, pixels, batch_of("cuda", pixels), "bfloat16", compiled)
            took = seconds[name] / (1 + compiled)
            rows[case.key] = vars(case) | {"seconds": took, "bytes": took, "revision": "abc1234"}
    return rows


def classifier_rows(pixels, compiled, **speeds):
    """Rows of ours, with 4 GMACs, and of Swin-T, with 5: as many images a second forward, half of that in training."""
    rows = {}
    for name, macs, speed in (
        ("gspn-grouped-t", 4e9, speeds["ours"]),
        ("swin_tiny_patch4_window7_224", 5e9, speeds["swin"]),
    ):
        for which, rate in {"forward": speed, "training step": speed / 2}.items():
            figures = {"name": name, "pass": which, "pixels": pixels, "macs": macs, "images_per_second": rate}
            rows[f"{name}, {which}, {pixels} px, {compiled}"] = figures | {"revision": "abc1234"}
    return rows


def unet_rows(ours, bound):
    """Rows of both UNets at all sizes that have a target."""
    seconds = {"gspn": ours, "projections alone": bound}
    return {
        f"{network}, {size}, {what}": {"seconds": took, "revision": "abc1234"}
        for network in ("SD-XL", "SD 1.5")
        for size in ("2048x2048", "4096x4096", "8192x8192", "8192x16384")
        for what, took in seconds.items()
    }


def write(folder, operator, models, unets=None, whole_image=None, **classifiers):
    files = {"operator-cuda": operator, "resolution-cuda": models}
    files |= {"text-to-image-cuda": unets or {}, "text-to-image-whole-cuda": whole_image or {}}
    files |= {f"classifiers-{name}": rows for name, rows in classifiers.items()}
    for name, rows in files.items():
        content = {"machine": "A Card, torch 2", "revision": "abc1234", "rows": rows}
        (folder / f"{name}.json").write_text(json.dumps(content))


def rows_of(lines):
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| "))
    return {name: figures for name, *figures in cells}


@pytest.fixture
def everything(tmp_path):
    """Results of all that has a target."""
    operator = {case.key: operator_row(1.0, 4.0 if case.trains else None) for case in scan_cases.cases()}
    models = {}
    for step, pixels in FIRST:
        models |= model_rows(step, pixels, ours=1.0, dit=2.0)
    eager = {f"{pixels}": classifier_rows(pixels, "eager", ours=100, swin=100) for pixels in (224, 1024)}
    compiled = classifier_rows(224, "compiled", ours=250, swin=50)
    whole = {"SD-XL, 8192x16384, end to end": {"reserved_bytes": 42e9, "revision": "abc1234"}}
    write(tmp_path, operator, models, unet_rows(1.5, 1.0), whole, **eager, compiled=compiled)
    return tmp_path


def percent(figures, size):
    return f"{figures[f'operator, share of the floor: {size}']['predicted']:.0%}"


def test_every_row_has_its_figures_and_is_measured(everything):
    figures = yaml.safe_load(FIGURES.read_text())
    assert list(figures) == list(targets())
    assert all(set(known) == {"landed", "reach", "predicted"} for known in figures.values())
    found = rows_of(table(everything))
    assert found["operator, share of the floor: 256 px"] == ["16%", "60%", percent(figures, "256 px"), "50%", "no"]
    assert found["operator, share of the floor: 16K px"][3:] == ["50%", "yes"]
    ratio = found["forward and backward over forward: 2048 px"]
    assert ratio[:2] == ["8.3", "at most 3.5"] and ratio[3:] == ["4.0", "no"]
    assert found["operator, times the speed of attention: 512 px"][3:] == ["3.0", "yes"]  # cuDNN's 3 ms over our 1
    assert found["XL forward, times the speed of DiT-XL/2: 16384 px"][3:] == ["2.00", "no"]
    training = found["XL training step, times the speed of DiT-XL/2: 512 px"]
    assert training[:2] == ["–", "1.60"] and training[3:] == ["2.00", "yes"]
    assert found["memory that a training step adds, over DiT-XL/2's: 256 px"][3:] == ["0.50", "yes"]
    swin = {
        pixels: f"gspn-grouped-t forward, times the speed of swin_tiny at equal MACs: {pixels} px"
        for pixels in (224, 1024)
    }
    assert found[swin[224]] == ["–", "1.20", "–", "2.00", "yes"]  # the faster of eager and compiled, of each
    assert found[swin[1024]][3:] == ["0.80", "no"]
    assert found[swin[224].replace("forward", "training step")][3:] == ["2.00", "yes"]
    assert found["UNet of SD-XL with line scans, times the bound: 2048 x 2048 px"][3:] == ["1.50", "no"]
    assert found["UNet of SD 1.5 with line scans, times the bound: 8192 x 16384 px"][2:] == ["–", "1.50", "no"]
    assert found["SD-XL generates 16384 x 8192 px, GB of the card"][1:] == ["at most 80", "21", "42", "yes"]
    assert "not measured" not in {figures[-1] for figures in found.values()}


def test_an_image_that_there_was_no_memory_for_is_not_measured(tmp_path):
    whole = {"SD-XL, 8192x16384, end to end": {"error": "out of memory", "revision": "abc1234"}}
    write(tmp_path, {}, {}, {"SD-XL, 2048x2048, gspn": {"error": "out of memory", "revision": "abc1234"}}, whole)
    found = rows_of(table(tmp_path))
    assert found["SD-XL generates 16384 x 8192 px, GB of the card"][3:] == ["–", "not measured"]
    assert found["UNet of SD-XL with line scans, times the bound: 2048 x 2048 px"][3:] == ["–", "not measured"]


def test_each_model_has_the_faster_of_its_settings(tmp_path):
    models = model_rows("forward", 256, ours=1.0, dit=2.0)
    eager = next(row for row in models.values() if row["model"] == "GSPN-DiT" and not row["compiled"])
    eager["seconds"] = 0.25
    write(tmp_path, {}, models)
    assert rows_of(table(tmp_path))["XL forward, times the speed of DiT-XL/2: 256 px"][3:] == ["4.00", "yes"]


def test_what_was_not_measured_or_failed_is_said_so(tmp_path, capsys):
    models = model_rows("forward", 256, ours=1.0, dit=2.0)
    for measured in models.values():
        del measured["seconds"]
        measured["error"] = "out of memory"
    write(tmp_path, {"256 px, global": operator_row(1.0, None)}, models)
    main(Options(results=str(tmp_path), out=str(tmp_path / "targets.md")))
    written = (tmp_path / "targets.md").read_text()
    assert written == capsys.readouterr().out
    found = rows_of(written.splitlines())
    assert found["operator, share of the floor: 256 px"][-1] == "no"
    assert {found[name][-1] for name in found if "XL" in name or "over forward" in name} == {"not measured"}
    assert "operator: A Card, torch 2. Code: abc1234." in written
    assert rows_of(table(tmp_path / "nothing"))["operator, share of the floor: 256 px"][-1] == "not measured"


def test_a_prediction_stands_beside_what_was_measured(everything, monkeypatch, tmp_path):
    figures = yaml.safe_load(FIGURES.read_text())
    figures["operator, share of the floor: 256 px"]["predicted"] = 0.55
    changed = tmp_path / "targets.yaml"
    changed.write_text(yaml.safe_dump(figures))
    monkeypatch.setattr("benchmarks.targets.FIGURES", changed)
    assert rows_of(table(everything))["operator, share of the floor: 256 px"] == ["16%", "60%", "55%", "50%", "no"]


def test_what_predictions_are_and_which_layout_attention_had_is_said(everything):
    lines = table(everything)
    assert "predicted (not measured)" in lines[0]
    assert any("at 512 and 1024 px are on contiguous heads" in line for line in lines)


def test_the_models_that_have_targets_are_measured_on_a_gpu():
    assert {pixels for _, pixels in FIRST} <= set(ResolutionOptions(device="cuda", dtypes=["bfloat16"]).pixels)
    asked = TextToImageOptions(device="cuda", dtype="bfloat16")
    measured = {f"{network}, {size}, gspn" for network in asked.networks for size in asked.sizes}
    assert set(unet_rows(1.0, 1.0)) <= measured | {key.replace("gspn", "projections alone") for key in measured}
