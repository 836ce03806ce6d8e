"""benchmarks/gpu.sh: what it runs, when it stops and what it says, with commands that do nothing in their places."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.deadline import GO_ON
from benchmarks.needed import NEEDED, lacking

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
STEPS = [
    "build",
    "tests",
    "tests-models",
    "operator",
    "block-gspn-dit-xl-2-forward",
    "block-dit-xl-2-forward",
    "block-gspn-dit-xl-2-training",
    "block-dit-xl-2-training",
    "depthwise",
    "models",
    *[f"classifiers-{size}" for size in (224, 1024, 384, 512)],
    *[f"classifiers-compiled-{size}" for size in (224, 1024)],
    "t2i-generate",
    "t2i-calls",
    "kernels-operator",
    "counters",
    "kernels-models",
    "memcheck",
    "racecheck",
    "curves",
]
AROUND = {"benchmarks.needed", "benchmarks.targets"}  # what is run before and after the parts
PYTHON = """#!/bin/bash
[ "$1" != -c ] || { echo "$REVISION"; exit 0; }
echo "$2" >>"$CALLS"
echo "$*" >>"$CALLS.whole"
[ "$2" != "$SAYS" ] || echo "$WORDS"
[ "$2" != "$SLEEPS" ] || exec sleep 20
[ "$2" != "$FAILS" ] || exit 3
"""
SANITIZER = """#!/bin/bash
while [[ "$1" == -* ]]; do case $1 in --tool | --report-api-errors | --error-exitcode) shift ;; esac; shift; done
exec "$@"
"""


@pytest.fixture
def script(tmp_path):
    """Runs the script in a folder of its own: result, and the modules that were run."""
    for name, text in {"python": PYTHON, "compute-sanitizer": SANITIZER, "ncu": "#!/bin/bash"}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def environment(**variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        paths = {
            "PYTHON": tmp_path / "bin" / "python",
            "CALLS": calls,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        }
        quiet = dict.fromkeys(("SAYS", "WORDS", "SLEEPS", "FAILS"), "") | {"REVISION": "abc1234"}
        return {key: str(value) for key, value in {**os.environ, **quiet, **paths, **variables}.items()}

    def run(*arguments, **variables):
        command = ["bash", SCRIPT, tmp_path / "out", *arguments]
        done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=60)
        calls = (tmp_path / "calls").read_text().split()
        assert [call for call in calls if call in AROUND] in ([], ["benchmarks.needed", "benchmarks.targets"])
        return done, [call for call in calls if call not in AROUND]

    run.environment, run.out, run.whole = environment, tmp_path / "out", tmp_path / "calls.whole"
    return run


def table(output):
    """What became of each step."""
    lines = output[output.rindex("\npart ") :].splitlines()[2:]
    return {line.split()[1]: " ".join(line.split()[3:]) for line in lines}


def test_it_runs_all_parts_and_then_no_step_of_the_same_commit_again(script):
    done, calls = script()
    assert (done.returncode, table(done.stdout)) == (0, dict.fromkeys(STEPS, "ok")), done.stdout + done.stderr
    assert calls == [
        "gspn_dit.ops",
        *["pytest"] * 2,
        "benchmarks.operator",
        *["benchmarks.block_budget"] * 4,
        "benchmarks.depthwise",
        "benchmarks.resolution",
        *["benchmarks.classifier_throughput"] * 6,
        *["benchmarks.text_to_image"] * 2,
        *["benchmarks.kernel_profile"] * 3,
        *["benchmarks.small_shapes"] * 2,
        "benchmarks.quality_curves",
    ]
    done, calls = script("operator", "tests")
    assert (done.returncode, calls) == (0, ["gspn_dit.ops"])
    assert table(done.stdout) == {"build": "ok", "operator": "done before"} | dict.fromkeys(
        ("tests", "tests-models"), "done before"
    )
    done, calls = script("operator", REVISION="def5678")
    assert (done.returncode, calls) == (0, ["gspn_dit.ops", "benchmarks.operator"])


@pytest.mark.parametrize("revision", ["abc1234 with changes", "gspn-dit 0.1.0, no git checkout"])
def test_what_no_commit_says_is_run_each_time(script, revision):
    for _ in range(2):
        done, calls = script("operator", REVISION=revision)
        assert (done.returncode, calls) == (0, ["gspn_dit.ops", "benchmarks.operator"])


def test_the_others_are_run_after_one_that_fails_and_it_is_tried_again(script):
    done, calls = script("tests", "operator", FAILS="pytest")
    assert done.returncode == 1 and calls[-1] == "benchmarks.operator"
    failed = dict.fromkeys(("tests", "tests-models"), "FAILED: exit status 3")
    assert table(done.stdout) == {"build": "ok", **failed, "operator": "ok"}
    done, calls = script("tests", "operator")
    assert (done.returncode, calls) == (0, ["gspn_dit.ops", "pytest", "pytest"])


def test_without_the_kernels_nothing_is_measured(script):
    done, calls = script("operator", FAILS="gspn_dit.ops")
    assert done.returncode == 1 and calls == ["gspn_dit.ops"]
    assert table(done.stdout)["operator"].startswith("NOT RUN: without the kernels")


def test_what_a_time_budget_has_stopped_is_unfinished(script):
    done, _ = script("models", SAYS="benchmarks.resolution", WORDS=f"DiT: {GO_ON}")
    assert done.returncode == 1 and table(done.stdout)["models"] == "UNFINISHED: run it again"
    done, calls = script("models")
    assert done.returncode == 0 and calls[-1] == "benchmarks.resolution"


def test_a_table_of_unets_that_has_no_time_left_goes_on_the_next_time(script):
    done, _ = script("t2i", SAYS="benchmarks.text_to_image", WORDS=GO_ON)
    assert done.returncode == 1
    assert table(done.stdout)["t2i-calls"] == "UNFINISHED: run it again"
    done, calls = script("t2i")
    assert (done.returncode, calls) == (0, ["gspn_dit.ops", *["benchmarks.text_to_image"] * 2])
    whole, calls = [line for line in script.whole.read_text().splitlines() if "text_to_image" in line][-2:]
    assert "--end-to-end true" in whole and whole.endswith("out/text-to-image-whole-cuda")
    assert "--time-budget" in calls and calls.endswith("out/text-to-image-cuda")


def test_each_part_ends_within_its_seconds_and_says_what_it_has_left_out(script):
    begun = time.monotonic()
    done, _ = script("--seconds", "3", "budget", "operator", SLEEPS="benchmarks.block_budget")
    assert time.monotonic() - begun < 15
    found = table(done.stdout)
    assert done.returncode == 1 and found["operator"] == "ok"
    assert found["block-gspn-dit-xl-2-forward"] == "UNFINISHED: no time left"
    assert found["depthwise"] == "NOT RUN: no time left"


def test_each_part_has_four_minutes_unless_it_is_told_otherwise(script):
    script("operator", "train", REVISION="abc1234 with changes")
    script("--seconds", "0", "models", "train", "--state", script.out / "elsewhere", DATA="fashion")
    runs = [line for line in script.whole.read_text().splitlines() if "quality_curves" in line]
    first, second = (run.split()[run.split().index("--seconds") + 1] for run in runs)
    assert 190 <= int(first) <= 200 and second == "180"
    assert f"--data photos --state {script.out}/train/state" in runs[0]
    assert f"--data fashion --state {script.out}/elsewhere" in runs[1]


def test_the_mode_of_compiling_is_passed_on_and_measured_beside_the_default(script):
    script("budget", "models")
    done, calls = script("--max-autotune", "budget", "models")
    assert (done.returncode, calls) == (
        0,
        ["gspn_dit.ops", *["benchmarks.block_budget"] * 4, "benchmarks.resolution"],
    )
    whole = script.whole.read_text().splitlines()
    budgets = [line for line in whole if "block_budget" in line]
    assert ["--compile-mode default" in line for line in budgets] == [True] * 4 + [False] * 4
    assert all("--compile-mode max-autotune" in line and line.endswith("-tuned.md") for line in budgets[4:])
    assert ["--max-autotune true" in line for line in whole if "benchmarks.resolution" in line] == [False, True]


def test_a_training_goes_on_each_time(script):
    for _ in range(2):
        done, calls = script("train")
        assert (done.returncode, calls) == (0, ["gspn_dit.ops", "benchmarks.quality_curves"])


def test_what_is_lacking_is_said_before_anything_is_run_and_only_what_needs_it_is_left_out(script):
    done, calls = script("train", "operator", SAYS="benchmarks.needed", WORDS="train accelerate scikit-image")
    said = done.stdout.splitlines()
    assert said[1] == "benchmarks/gpu.sh: train lacks accelerate scikit-image"
    assert (done.returncode, calls) == (1, ["gspn_dit.ops", "benchmarks.operator"])
    assert table(done.stdout)["train"] == "NOT RUN: it lacks accelerate scikit-image"


def test_without_nsight_compute_the_rest_of_the_profile_is_made(script):
    programs = {name: shutil.which(name) for name in ("bash", "cat", "date", "dirname", "grep", "mkdir", "realpath")}
    programs |= {name: shutil.which(name) for name in ("env", "tail", "tee", "timeout", "wc")}
    folder = script.out.parent / "few"
    folder.mkdir()
    for name, path in programs.items():
        (folder / name).symlink_to(path)
    done, calls = script("profile", PATH=folder)
    assert (done.returncode, calls) == (0, ["gspn_dit.ops", *["benchmarks.kernel_profile"] * 2]), done.stderr
    assert table(done.stdout)["counters"] == "left out: no ncu, of Nsight Compute, on the PATH"


def test_every_part_has_its_needs_and_this_machine_has_those_of_the_first():
    parts = re.search(r"^all=\((.*)\)$", SCRIPT.read_text(), re.MULTILINE)[1].split()
    assert {*parts, "tests-models"} == set(NEEDED) and not lacking("tests")


def test_what_is_lacking_is_a_package_and_is_not_imported(monkeypatch):
    monkeypatch.setitem(NEEDED, "train", {"torch": "torch", "no_such_module": "no-such-package"})
    assert lacking("train") == ["no-such-package"]
    code = (
        "import runpy, sys; sys.argv = ['x', 'train']; runpy.run_module('benchmarks.needed', run_name='__main__'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert done.stdout.split()[-1] == "False"


def test_a_stopped_one_prints_its_table(script):
    environment = script.environment(SLEEPS="benchmarks.operator")
    with subprocess.Popen(
        ["bash", SCRIPT, script.out, "tests", "operator"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        while "benchmarks.operator" not in Path(environment["CALLS"]).read_text():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=10)
    assert process.returncode == 1 and table(said) == dict.fromkeys(("build", "tests", "tests-models"), "ok")


@pytest.mark.parametrize(
    "arguments", [["kernels"], ["--seconds", "soon"], ["--seconds"], ["--state"], ["--colour", "x"]]
)
def test_a_wrong_command_line_is_refused_before_anything(script, arguments):
    done, calls = script(*arguments)
    assert done.returncode == 2 and not calls and not script.out.exists()
    assert done.stderr.count("\n") == 1 and "usage: benchmarks/gpu.sh OUT" in done.stderr


def test_it_looks_for_the_words_of_what_is_unfinished():
    assert GO_ON.partition("; ")[2] in SCRIPT.read_text()
