"""Who asks for a module or a command of an earlier version is told where it is now, in one line."""

import importlib
import re
import subprocess
import sys

import pytest

import gspn_dit
from gspn_dit.commands import VERBS
from gspn_dit.successors import _SUCCESSORS


@pytest.mark.parametrize("name", _SUCCESSORS)
def test_an_old_module_names_one_that_is_there(name):
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"{name} is now gspn_dit.")) as error:
        importlib.import_module(name)
    for successor in re.findall(r"gspn_dit(?:\.\w+)+", str(error.value).removeprefix(name)):
        room, _, thing = successor.rpartition(".")
        assert importlib.util.find_spec(successor) or hasattr(importlib.import_module(room), thing)
    for verb in re.findall(r"`gspn-dit ([\w-]+)`", str(error.value)):
        assert verb in VERBS


def test_a_folder_left_by_an_old_version_does_not_pass_for_a_package(tmp_path, monkeypatch):
    (tmp_path / "fid" / "__pycache__").mkdir(parents=True)
    monkeypatch.setattr(gspn_dit, "__path__", [*gspn_dit.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match=r"gspn_dit\.fid is now"):
        importlib.import_module("gspn_dit.fid.evaluate")


def test_an_old_command_ends_with_one_line():
    done = subprocess.run([sys.executable, "-m", "gspn_dit.export", "run", "out"], capture_output=True, text=True)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "gspn-dit export" in line


def test_what_is_imported_from_a_package_by_its_old_name_says_where_it_is():
    with pytest.raises(ImportError, match=r"is now gspn_dit\.autoencoder\.load_vae"):
        from gspn_dit.data import load_vae  # noqa: F401
    with pytest.raises(ImportError, match=r"is now gspn_dit\.inference\.export"):
        from gspn_dit import export  # noqa: F401
