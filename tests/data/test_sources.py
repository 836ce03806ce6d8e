"""Sources by their names: those of a table, of a call, and of an installed package's entry point."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from gspn_dit.data.sources import SOURCES, only_size, split_name
from gspn_dit.errors import InputError
from gspn_dit.evaluation.classifiers import check_features
from gspn_dit.registry import Registry
from gspn_dit.storage.packaged import PACKAGED_CLASSIFIERS, PACKAGED_MODELS, PACKAGED_VAES, absolute

ROOT = Path(__file__).parents[2]
DOTS = '''
import torch

from gspn_dit.data import ImageDataset


class Dots(ImageDataset):
    """Grey squares in two classes."""

    def __init__(self, split, image_size, seed):
        super().__init__(["dark", "light"], image_size)
        self.count = {"train": 6, "test": 4}[split]

    def __len__(self):
        return self.count

    def load(self, index):
        return torch.full((3, self.image_size, self.image_size), 255 * (index % 2), dtype=torch.uint8), index % 2
'''
ENTRY_POINTS = "[gspn_dit.sources]\ndots = dots_of_another:Dots\n"
ENCODE = ["encode", "--data", "dots", "--vae", "digits", "--image-size", "32", "--num-workers", "0", "--out", "store"]


@pytest.fixture
def another_package(tmp_path):
    """A folder for the path with an installed package that has a source and declares it, or not."""
    (tmp_path / "dots_of_another.py").write_text(DOTS)
    described = tmp_path / "dots_of_another-1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: dots-of-another\nVersion: 1\n")
    (described / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


def run(folder, script):
    """The finished process of a script that finds the folder's modules, in that folder."""
    paths = os.pathsep.join([str(ROOT), str(folder)])
    environment = os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_another_packages_source_is_one_like_ours_without_a_line_of_ours(another_package):
    """It is encoded, and scored against its test split; a folder of its name beside it is not taken for it."""
    (another_package / "dots").mkdir()
    script = f"""
from gspn_dit.__main__ import main
from gspn_dit.config import DataConfig
from gspn_dit.data import LatentStore
from gspn_dit.evaluation.image_sets import open_reference
main({ENCODE!r})
store = LatentStore("store")
print(len(store), store.class_names, store.manifest["data"], len(open_reference("dots:test", (32, 32))))
print(DataConfig(source="dots").source)
"""
    done = run(another_package, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["6 ['dark', 'light'] dots 4", "dots"]


def test_a_source_is_registered_by_a_call(another_package):
    (another_package / "dots_of_another-1.dist-info" / "entry_points.txt").unlink()
    script = """
from gspn_dit.data import open_images, register_source
register_source("dots", "dots_of_another:Dots")
print(len(open_images("dots", 8)), open_images("dots", 8, split="test")[1][0].float().mean().item())
"""
    done = run(another_package, script)
    assert (done.returncode, done.stdout.split()) == (0, ["6", "255.0"]), done.stderr


def test_nothing_is_imported_for_the_names_alone():
    script = """
import sys
from importlib.metadata import EntryPoint
from gspn_dit.data.sources import SOURCES, split_name
from gspn_dit.evaluation.classifiers import CLASSIFIERS
assert list(CLASSIFIERS) == ["digits", "photos"] and list(SOURCES) == [*CLASSIFIERS, "scenes", "emoji"]
assert split_name("photos:test") and "x" not in SOURCES
print(sorted({"torch", "numpy", "mlxtend", "skimage", "gspn_dit.demo"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_name_is_given_once():
    registry = Registry("gspn_dit.none", {"one": "math:pi"})
    registry.register("two", "math:e")
    assert list(registry) == ["one", "two"] and registry.load("two") > 2.7
    with pytest.raises(ValueError, match=r"^'one' is taken: it names math:pi"):
        registry.register("one", "math:tau")
    with pytest.raises(KeyError):
        registry.load("three")


def test_names_have_splits_and_sizes():
    assert [split_name(name) for name in ("digits", "digits:test", "./digits", "cats")] == [
        ("digits", "train"),
        ("digits", "test"),
        None,
        None,
    ]
    assert (only_size("digits"), only_size("photos")) == (32, None)


def test_what_is_packaged_is_there():
    for table in (PACKAGED_MODELS, PACKAGED_VAES, PACKAGED_CLASSIFIERS):
        assert set(table) <= set(SOURCES) and all(path.exists() for path in table.values())


def test_a_path_becomes_absolute_and_a_name_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "other"):
        (tmp_path / name).mkdir()
    assert absolute("digits", SOURCES) == "digits"
    assert absolute("./digits", SOURCES) == absolute("digits") == str(tmp_path / "digits")
    assert absolute("other", SOURCES) == str(tmp_path / "other")
    assert absolute("nowhere", SOURCES) == "nowhere"


def test_features_of_no_name_are_refused_with_the_names():
    check_features("features", "inception")
    with pytest.raises(InputError, match=r"^features='clip': wanted inception, digits or photos$"):
        check_features("features", "clip")


def declared(monkeypatch, **places):
    entries = [EntryPoint(name, place, "made.up") for name, place in places.items()]
    monkeypatch.setattr("gspn_dit.registry.entry_points", lambda group: entries)
    return Registry("made.up", {"taken": "json:loads"})


def test_an_entry_point_that_cannot_be_loaded_is_one_line_about_it(monkeypatch):
    registry = declared(
        monkeypatch, broken="nowhere_at_all:X", absent="json:no_such_thing", deep="json:JSONDecoder.decode"
    )
    for name in ("broken", "absent"):
        with pytest.raises(InputError, match=rf"^made\.up='{name}': .* cannot be loaded"):
            registry.load(name)
    assert registry.load("deep").__name__ == "decode"


def test_a_declared_name_that_is_taken_is_left_out_with_a_warning(monkeypatch):
    registry = declared(monkeypatch, taken="json:dumps")
    with pytest.warns(UserWarning, match="json:dumps is declared as 'taken'"):
        assert list(registry) == ["taken"]
    assert registry.load("taken").__name__ == "loads"
