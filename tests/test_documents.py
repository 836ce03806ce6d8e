"""What the documents say: figures that can be counted, commands and tests that are there."""

from __future__ import annotations

import re
import runpy
import shlex
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from gspn_dit import commands as verbs
from gspn_dit import options
from gspn_dit.models import create_model
from gspn_dit.models.macs import count_macs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "quickstart.sh"]
FAMILIES = ("dit", "gspn", "gspn-dit")
SIZES = ("s", "b", "l", "xl")
STARTS = "(?:python|accelerate launch|gspn-dit)"  # of a command


def on_meta(name: str, **overrides: object) -> torch.nn.Module:
    with torch.device("meta"):
        return create_model(name, **overrides)


def cells(family: str) -> list[list[str]]:
    """The numbers of the README's row of a family: parameters, GMACs at 256 and at 512 pixels, of its four sizes."""
    row = re.search(rf"^\| {family}-s-2 / b / l / xl \|(.*)\|$", README, re.M)[1]
    return [cell.removesuffix(" M ").strip().split(" / ") for cell in row.split("|")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_readmes_parameters_are_the_models(family):
    assert [f"{on_meta(f'{family}-{size}-2').num_parameters() / 1e6:.1f}" for size in SIZES] == cells(family)[0]


@pytest.mark.parametrize("size", ["s", "b"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_readmes_gmacs_are_the_models(family, size):
    model = on_meta(f"{family}-{size}-2")
    counted = [f"{count_macs(model, (pixels // 8, pixels // 8)) / 1e9:.1f}" for pixels in (256, 512)]
    assert counted == [column[SIZES.index(size)] for column in cells(family)[1:]]


def test_the_readmes_parts_run(monkeypatch):
    """As written, but for the weights, which are on the meta device."""
    monkeypatch.setattr("gspn_dit.models.create_model", on_meta)
    found = {}
    exec(re.search(r"## Use the parts\n\n```python\n(.*?)```", README, re.S)[1], found)
    assert found["y"].shape == found["x"].shape and found["y"].isfinite().all()
    assert (found["model"].config.mixer, found["other"].config.mixer) == ("gspn", "linear")
    assert found["model"].config.width == 1152


def commands() -> list:
    """Script or module and arguments of every command in the documents that has any."""
    found = {}
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        blocks = [text] if document.suffix == ".sh" else re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
        lines = [line for block in blocks for line in block.splitlines()]
        text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += [line.replace("\n", " ") for line in re.findall(rf"`({STARTS} [^`]*)`", text)]
        for line in lines:
            if not re.search(rf"\b{STARTS} ", line):
                continue
            words = shlex.split(line, comments=True)
            words = words[words[0] == "run" :]  # of quickstart.sh
            if words[0] == "gspn-dit":
                words[:1] = ["python", "-m", "gspn_dit"]
            if "-c" in words:  # bash -c 'exec accelerate launch …'
                words = shlex.split(words[-1])
            start = next((i for i, word in enumerate(words) if word == "-m" or word.endswith(".py")), len(words))
            start += words[start : start + 1] == ["-m"]
            program, arguments = words[start : start + 1], words[start + 1 :]
            if arguments and "--help" not in arguments:
                found[f"{document.name}: {' '.join(program + arguments)}"] = (program[0], arguments)
    return [pytest.param(*command, id=name) for name, command in found.items()]


def test_commands_are_found_in_all_documents_that_have_some():
    documents = {command.id.partition(":")[0] for command in commands()}
    assert documents >= {"README.md", "ablations.md", "cluster.md", "performance.md", "resolution.md", "quickstart.sh"}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("program", "arguments"), commands())
def test_a_documented_command_has_the_options_it_is_given(monkeypatch, program, arguments):
    parsed = []

    def only_parse(main, kind, *, argv=None, positional=(), **_):
        parsed.append(options.parse(kind, argv, positional=positional, exit_on_error=False))

    monkeypatch.chdir(ROOT)
    for module in (options, verbs):
        monkeypatch.setattr(module, "command", only_parse)
    monkeypatch.setattr("sys.argv", [program, *arguments])
    with suppress(SystemExit):  # of a module that has done its work
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    assert len(parsed) == 1


def test_the_tests_that_reliability_names_exist():
    row_tests = re.findall(r"`([\w/]*test_\w+\.py)?::(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    file = None
    for named, test in row_tests:
        file = named or file
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
    assert len(row_tests) > 20
