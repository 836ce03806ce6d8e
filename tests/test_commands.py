"""The command `gspn-dit`: its verbs, what a mistake costs, and how it is answered."""

import importlib
import inspect
import re
import runpy
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from gspn_dit import commands
from gspn_dit.__main__ import main
from gspn_dit.commands import VERBS
from gspn_dit.errors import InputError, Stopped
from gspn_dit.options import command

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "train_dit.py": "train",
    "train_classifier.py": "train-classifier",
    "distill_t2i.py": "distill-t2i",
    "train_t2i.py": "train-t2i",
    "sample.py": "sample",
    "generate_t2i.py": "generate",
    "fid/evaluate.py": "evaluate",
    "fid/reference.py": "reference",
}


@dataclass
class Shown:
    """Options of a made command.

    Args:
        count: How many.
    """

    count: int = 1


def test_without_a_verb_each_is_explained_in_a_line(capsys):
    listed = []
    for argv in ([], ["--help"]):
        main(argv)
        listed.append(capsys.readouterr().out)
    assert listed[0] == listed[1]
    for name, verb in VERBS.items():
        assert re.search(rf"^ +{name} +{re.escape(verb.help)}$", listed[0], re.M)


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["sampel"], "'sampel': no such command; did you mean sample?"),
        (["small_vae"], "did you mean small-vae?"),
        (["qqq"], "'qqq': no such command; wanted one of ops, models, budget, encode, train, "),
        (["--seed", "3"], "--seed: the command comes first"),
    ],
)
def test_an_unknown_verb_is_answered_with_the_nearest(capsys, argv, answer):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.startswith("gspn-dit: error: ") and answer in printed and printed.count("\n") == 1


def test_a_mistake_or_help_is_answered_before_anything_slow_is_imported():
    """Of every verb, by the command and by `python -m` with the verb's module."""
    script = """
import runpy, sys
from gspn_dit.__main__ import main
from gspn_dit.commands import VERBS
def run(name, argv, status):
    sys.argv = [name, *argv]
    try:
        main([name, *argv]) if name in VERBS else runpy.run_module(name, run_name="__main__")
    except SystemExit as stopped:
        assert stopped.code == status, (name, argv)
    else:
        raise AssertionError((name, argv))
for name in [*VERBS, *(verb.main.partition(":")[0] for verb in VERBS.values())]:
    for argv, status in (["--no-such-option", "1"], 2), (["-x"], 2), (["--help"], 0):
        run(name, argv, status)
print(sorted({"torch", "numpy", "diffusers", "transformers", "accelerate", "safetensors", "PIL"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    refusals = done.stderr.splitlines()
    assert len(refusals) == 4 * len(VERBS)
    first, verb = next(iter(VERBS.items()))
    module = verb.main.partition(":")[0].removesuffix(".__main__")
    assert refusals[0] == f"gspn-dit {first}: error: --no-such-option: no such option; --help lists them"
    assert refusals[2 * len(VERBS)] == refusals[0].replace(f"gspn-dit {first}", f"python -m {module}")


@pytest.mark.parametrize("name", VERBS)
def test_each_verb_is_a_function_of_its_options(name):
    module, _, function = VERBS[name].main.partition(":")
    work = getattr(importlib.import_module(module), function)
    assert len(inspect.signature(work).parameters) == 1 and work.__doc__


def started(monkeypatch, run) -> list:
    """The verbs, as `module:function`, that something starts."""
    begun = []
    monkeypatch.setattr(commands, "command", lambda work, *_, **__: begun.append(work))
    with suppress(SystemExit):  # of a module that has done its work
        run()
    return begun


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_every_module_with_a_main_runs_as_one(monkeypatch):
    files = [path for path in ROOT.glob("gspn_dit/**/*.py") if re.search(r"^def main\(\w+: ", path.read_text(), re.M)]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files} - {"gspn_dit.__main__"}
    assert modules == {verb.main.partition(":")[0] for verb in VERBS.values()}
    for module in modules:
        begun = started(monkeypatch, lambda module=module: runpy.run_module(module, run_name="__main__"))
        assert begun == [f"{module}:main"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_the_verbs(monkeypatch, script):
    begun = started(monkeypatch, lambda: runpy.run_path(str(ROOT / script), run_name="__main__"))
    assert begun == [VERBS[SCRIPTS[script]].main]


def test_a_warning_is_one_line_without_a_place_in_the_code(capsys):
    def warn(options):
        warnings.warn("few images,\nfor a score", stacklevel=1)
        warnings.warn("a library's own affair", FutureWarning, stacklevel=1)

    before = warnings.showwarning
    command(warn, Shown, prog="made", argv=[])
    assert capsys.readouterr().err == "warning: few images, for a score\n"
    assert warnings.showwarning is before


def test_work_that_stops_says_so_in_the_name_of_its_command(capsys):
    def stop(options):
        raise Stopped("stopped: the loss is nan", 1)

    with pytest.raises(SystemExit) as stopped:
        command(stop, Shown, prog="gspn-dit made", argv=[])
    assert (stopped.value.code, capsys.readouterr().err) == (1, "gspn-dit made: stopped: the loss is nan\n")


@pytest.mark.parametrize(
    ("argv", "yaml", "printed"),
    [
        (["--count", "3"], None, "--count=3: wanted fewer"),
        (["--count", "3"], "count: 4", "--count=3: wanted fewer"),
        ([], "count: 3", "count=3: wanted fewer"),
    ],
)
def test_an_error_of_the_work_names_the_option_as_it_was_typed(capsys, tmp_path, argv, yaml, printed):
    def refuse(options):
        raise InputError(argument="count", value=options.count, wanted="fewer")

    if yaml:
        (tmp_path / "options.yaml").write_text(yaml)
        argv = ["--config", str(tmp_path / "options.yaml"), *argv]
    with pytest.raises(SystemExit) as stopped:
        command(refuse, Shown, prog="made", argv=argv)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"made: error: {printed}\n"
