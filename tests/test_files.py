"""Files that are whole or not there, and which folders are a run's checkpoints."""

import os

import pytest
import torch
from safetensors.torch import load_file

from gspn_dit.files import replacing, save_tensors
from gspn_dit.runs import checkpoint_step, list_checkpoints


def test_a_file_is_whole_or_not_there(tmp_path):
    def interrupted():
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_as_readable_as_other_files(tmp_path):
    (tmp_path / "text").write_text("")
    save_tensors({"one": torch.ones(1)}, tmp_path / "tensors")
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "text").stat().st_mode
    assert load_file(tmp_path / "tensors")["one"] == 1


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_ino, path.read_text())))
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert synced == [(path.stat().st_ino, "old")]
    assert path.read_text() == "new"


def test_checkpoints_are_listed_by_step_and_only_when_whole(tmp_path):
    for name in ("step-0000900", "step-10000000", "step-0001000", "step-last", "step-5.tmp", ".step-0002000.tmp"):
        (tmp_path / "checkpoints" / name / "ema").mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "metadata.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-0003000" / "ema").mkdir(parents=True)  # no metadata.json
    (tmp_path / "checkpoints" / "step-0004000").mkdir()
    (tmp_path / "checkpoints" / "step-0004000" / "metadata.json").write_text("{}")  # no ema/
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [900, 1000, 10000000]
    assert list_checkpoints(tmp_path / "nowhere") == []
