"""benchmarks/classification.py: mixers at equal cost, cells that processes share and that may be cut anywhere."""

from __future__ import annotations

import json
import os
import signal

import pytest
from made.classifying import write_idx_folder

from benchmarks.classification import Options, main
from benchmarks.classification_cell import SHOWN, mlp_ratio, size_of
from benchmarks.classification_report import table
from benchmarks.commands import CLASSIFICATION_MIXERS
from benchmarks.deadline import GO_ON
from gspn_dit.errors import InputError
from gspn_dit.options import parse
from gspn_dit.storage.files import alone_in
from gspn_dit.training.classification import ClassificationTask


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """Made pictures of 28 pixels and ten classes."""
    return str(write_idx_folder(tmp_path_factory.mktemp("clothes"), images=24, size=28, classes=10, test_images=12))


def few(clothes, out, **changes):
    """A training of three steps."""
    return Options(
        **{"data": clothes, "out": str(out), "mixers": ["gspn"], "seeds": 1, "steps": 3, "batch_size": 4} | changes
    )


def results(out):
    return {str(path.relative_to(out)): json.loads(path.read_text()) for path in out.rglob("result.json")}


def test_every_baseline_costs_what_ours_does_and_all_are_small():
    sizes = {mixer: size_of(mixer, mlp_ratio(mixer)) for mixer in CLASSIFICATION_MIXERS}
    ours = sizes["gspn"][1]
    assert all(abs(macs / ours - 1) < 0.01 and parameters < 1e6 for parameters, macs in sizes.values())
    assert mlp_ratio("gspn") == 4 and all(1 < mlp_ratio(mixer) < 4 for mixer in sizes.keys() - {"gspn"})


def test_what_is_finished_is_not_trained_again_and_mixers_may_be_added(clothes, tmp_path, monkeypatch, capsys):
    main(few(clothes, tmp_path))
    (first,) = results(tmp_path).values()
    assert set(first["top1"]) == {str(side) for side in SHOWN} and len(first["losses"]) == 1
    assert "all is done" in capsys.readouterr().out
    main(few(clothes, tmp_path, mixers=["gspn", "conv"]))
    assert results(tmp_path)["gspn/seed-0/result.json"] == first
    assert {"gspn/seed-0/model", "conv/seed-0/model"} == {
        str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("config.json")
    }
    monkeypatch.setattr("benchmarks.classification_cell.train", None)  # it would fail
    main(few(clothes, tmp_path, mixers=["gspn", "conv"]))
    rows = [line.split(" | ")[0] for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert rows == ["| mixer", "| gspn", "| conv"] and (tmp_path / "losses.png").stat().st_size > 0
    with pytest.raises(InputError, match="was begun with steps=3"):
        main(few(clothes, tmp_path, steps=4))


def test_one_that_is_stopped_judges_nothing_and_goes_on_to_the_same_result(clothes, tmp_path, monkeypatch, capsys):
    main(few(clothes, tmp_path / "whole"))
    batch = ClassificationTask.batch

    def stopped(self, samples, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, samples, step)

    monkeypatch.setattr(ClassificationTask, "batch", stopped)
    main(few(clothes, tmp_path / "cut", mixers=["gspn", "conv"]))
    assert not results(tmp_path / "cut") and not (tmp_path / "cut" / "conv").exists()
    assert GO_ON in capsys.readouterr().out
    monkeypatch.setattr(ClassificationTask, "batch", batch)
    main(few(clothes, tmp_path / "cut"))
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_a_cell_that_another_process_has_is_left_to_it(clothes, tmp_path, monkeypatch, capsys):
    def held(folder, wait):
        if folder.parent.name == "gspn":
            wait("process 1")
        return alone_in(folder, wait)

    monkeypatch.setattr("benchmarks.cells.alone_in", held)
    main(few(clothes, tmp_path, mixers=["gspn", "conv"]))
    assert list(results(tmp_path)) == ["conv/seed-0/result.json"] and GO_ON in capsys.readouterr().out


def test_speed_is_measured_of_each_mixer_and_trains_none(clothes, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.classification_cell.STEPS", 1)
    main(few(clothes, tmp_path, mixers=["gspn", "conv"], speed=True))
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert set(speed["images"]) == {"gspn", "conv"} and min(speed["images"].values()) > 0
    assert not results(tmp_path)


def test_the_table_has_means_over_seeds():
    cost = {"mlp_ratio": 1.75, "parameters": 184_786, "macs": 14_087_872}
    runs = [
        {**cost, "top1": {"28": top1}, "losses": [(10, 1.0), (20, loss)]} for top1, loss in ((80.0, 0.5), (82.0, 0.7))
    ]
    cells = [cell.strip() for cell in table({"attention": runs}, {"attention": 123.4})[-1].strip("|").split("|")]
    assert cells == ["attention", "2", "1.75", "0.185", "14.09", "81.00 ± 1.41", "0.8000 ± 0.0707", "123"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/", "--mixers", "[mamba]"], "mixers='mamba': wanted one of gspn, attention, linear, window, conv"),
        (["--data", "/", "--steps", "0"], "steps=0: wanted 1 or more"),
        (["--data", "/", "--sizes", "[40, 20]"], r"sizes=\(40, 20\): wanted two numbers of pixels"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(Options, arguments, exit_on_error=False)


def test_data_that_are_not_there_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="wanted a folder of idx files"):
        main(few(str(tmp_path / "nowhere"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
