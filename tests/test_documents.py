"""What the documents say: figures that can be counted, commands and tests that are there."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import commands as benchmarks
from gspn_dit import commands as verbs
from gspn_dit import options
from gspn_dit.data.sources import SOURCES, open_images
from gspn_dit.errors import InputError
from gspn_dit.layers.mixers import MIXERS
from gspn_dit.models import create_classifier, create_model, list_classifiers
from gspn_dit.models.macs import count_macs

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [ROOT / "README.md", CONTRIBUTING, ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS = [*PAGES, ROOT / "quickstart.sh"]
README = PAGES[0].read_text()
MODELS = (ROOT / "docs" / "models.md").read_text()
FAMILIES = ("dit", "gspn", "gspn-dit")
SIZES = ("s", "b", "l", "xl")
STARTS = "(?:python|accelerate launch|gspn-dit)"  # of a command


def on_meta(name: str, **overrides: object) -> torch.nn.Module:
    with torch.device("meta"):
        return create_model(name, **overrides)


def cells(family: str) -> list[list[str]]:
    """The numbers of a family's row in the table of models: parameters, GMACs at 256 and at 512 pixels, of four sizes.

    The table stands once, in whichever page.
    """
    (row,) = (
        row for page in PAGES for row in re.findall(rf"^\| {family}-s-2 / b / l / xl \|(.*)\|$", page.read_text(), re.M)
    )
    return [cell.removesuffix(" M ").strip().split(" / ") for cell in row.split("|")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_documented_parameters_are_the_models(family):
    assert [f"{on_meta(f'{family}-{size}-2').num_parameters() / 1e6:.1f}" for size in SIZES] == cells(family)[0]


@pytest.mark.parametrize("size", ["s", "b"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_documented_gmacs_are_the_models(family, size):
    model = on_meta(f"{family}-{size}-2")
    counted = [f"{count_macs(model, (pixels // 8, pixels // 8)) / 1e9:.1f}" for pixels in (256, 512)]
    assert counted == [column[SIZES.index(size)] for column in cells(family)[1:]]


def test_the_documented_classifiers_are_the_models():
    rows = re.findall(r"^\| `(gspn-[\w-]+)` \|[^|]*\| ([\d.]+) M \| ([\d.]+)(?: at 28)? \|$", MODELS, re.M)
    assert [name for name, *_ in rows] == list_classifiers()
    for name, millions, gmacs in rows:
        with torch.device("meta"):
            model = create_classifier(name)
        size = model.pretrained_cfg["input_size"][1:]
        assert f"{model.num_parameters() / 1e6:.{len(millions.partition('.')[2])}f}" == millions
        assert f"{count_macs(model, size) / 1e9:.{len(gmacs.partition('.')[2])}f}" == gmacs


def test_the_documents_classifiers_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    first, second = (block for block in python_blocks(ROOT / "docs" / "models.md") if "backbone" in block)
    exec(first, found)
    assert found["logits"].shape == (1, 10)
    assert [tuple(each.shape[2:]) for each in found["maps"]] == [(64, 48), (32, 24), (16, 12), (8, 6)]
    with torch.device("meta"):
        exec(second, found)
    assert (found["model"].num_classes, found["backbone"].feature_info.reduction()) == (10, [8, 16, 32])


def test_the_readmes_parts_run(monkeypatch):
    """As written, but for the weights, which are on the meta device."""
    monkeypatch.setattr("gspn_dit.models.create_model", on_meta)
    found = {}
    exec(re.search(r"## Use the parts\n\n```python\n(.*?)```", README, re.S)[1], found)
    assert found["y"].shape == found["x"].shape and found["y"].isfinite().all()
    assert (found["model"].config.mixer, found["other"].config.mixer) == ("gspn", "linear")
    assert found["model"].config.width == 1152


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


def test_contributings_mixer_runs_in_a_block(monkeypatch):
    monkeypatch.setitem(MIXERS, "mean", None)  # so that it is forgotten after the test
    exec(python_blocks(CONTRIBUTING)[0], {})
    model = create_model("gspn-dit-ti-2", mixer="mean", width=32, depth=2, num_groups=2, num_classes=10)
    latents = torch.randn(2, 4, 8, 4)
    assert model(latents, torch.tensor([1.0, 900.0]), torch.tensor([3, 10])).shape == (2, 8, 8, 4)


def test_contributings_source_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(SOURCES, "_table", dict(SOURCES._table))
    module = ModuleType("my_package.stripes")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(python_blocks(CONTRIBUTING)[1], vars(module))
    images = open_images("stripes", 8)
    for index, across in enumerate((True, False, True)):
        image, label = images[index]
        assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and label == 1 - across
        assert (image[:, :, :1] == image).all() == across and (image[:, :1] == image).all() != across
    with pytest.raises(InputError, match="split"):
        open_images("stripes", 8, split="test")


def test_the_readme_is_read_in_five_minutes():
    assert len(README.split()) <= 1200  # as `wc -w` counts


def test_the_readme_lists_every_command():
    table = README.partition("## All commands")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.M) == list(verbs.VERBS)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]*)\)|<img src=\"([^\"]*)\"", page.read_text())
    for link in filter(None, (link or source for link, source in links)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_a_page_is_python(page):
    for block in python_blocks(page):
        compile(block, page.name, "exec")


LIST_ITEM = r"(?:[-*]|\d+\.) +"


def paragraphs(page: Path) -> list[list[str]]:
    """The lines of a page's paragraphs and list items, without tables, headings, pictures and code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    found = []
    for block in re.split(r"\n\s*\n", text):
        if block.lstrip("\n").startswith("    "):  # indented code
            continue
        lines = []
        for line in block.splitlines():
            if not line or line[0] in "|#<!":
                continue
            if lines and re.match(rf"\s*{LIST_ITEM}", line):
                found.append(lines)
                lines = []
            lines.append(re.sub(rf"^\s*(?:{LIST_ITEM})?", "", line))
        found.append(lines)
    return [lines for lines in found if lines]


def sentences(line: str) -> list[str]:
    line = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "`code`", line))
    return re.split(r"(?<=[.!?])[*)\"]*\s+(?=[\[(*\"`]*[A-Z0-9λ`])", line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_line_of_markdown_is_one_sentence(page):
    for lines in paragraphs(page):
        for line in lines:
            assert len(sentences(line)) == 1, f"several sentences: {line}"
        for line in lines[:-1]:
            assert re.search(r"[.:!?][*)\"]*$", line), f"a sentence goes on in the next line: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page):
    words = [len(sentence.split()) for lines in paragraphs(page) for line in lines for sentence in sentences(line)]
    assert max(words) <= 35
    assert sum(words) / len(words) < 18


def test_the_figure_of_a_scan_is_drawn(tmp_path):
    """From the operator, whose scan reaches no line before its token's, and with chunks none beyond them."""
    script = runpy.run_path(ROOT / "docs" / "figures" / "scan.py")
    centre, down = script["CENTRE"], script["response"](("down",))
    assert not down[:centre].any() and (down[-1] > 0).all()
    reached = script["response"](script["ALL"], chunk=11).nonzero()
    assert (reached.min(), reached.max()) == (11, 21)
    script["main"](tmp_path / "scan.png")
    assert (tmp_path / "scan.png").stat().st_size > 10_000


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
    pages = {"ablations", "cluster", "demo", "evaluation", "performance", "results", "sampling", "training"}
    assert documents >= {"README.md", "quickstart.sh", *(f"{page}.md" for page in pages)}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("program", "arguments"), commands())
def test_a_documented_command_has_the_options_it_is_given(monkeypatch, program, arguments):
    parsed = []

    def only_parse(main, kind, *, argv=None, positional=(), **_):
        parsed.append(options.parse(kind, argv, positional=positional, exit_on_error=False))

    monkeypatch.chdir(ROOT)
    for module in (options, verbs, benchmarks):
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
