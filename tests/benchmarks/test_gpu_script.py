"""benchmarks/gpu.sh: what it runs, when it stops and what it says, with commands that do nothing in their places."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.deadline import GO_ON

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
STEPS = [
    "build",
    "tests",
    "operator",
    "block-gspn-dit-xl-2-forward",
    "block-dit-xl-2-forward",
    "block-gspn-dit-xl-2-training",
    "block-dit-xl-2-training",
    "depthwise",
    "resolution",
    "quality",
    "memcheck",
    "racecheck",
]
PYTHON = """#!/bin/bash
[ "$1" != -c ] || { echo "$REVISION"; exit 0; }
echo "$2" >>"$CALLS"
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
    for name, text in {"python": PYTHON, "compute-sanitizer": SANITIZER}.items():
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
        return done, (tmp_path / "calls").read_text().split()

    run.environment, run.out = environment, tmp_path / "out"
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
        "pytest",
        "benchmarks.operator",
        *["benchmarks.block_budget"] * 4,
        "benchmarks.depthwise",
        "benchmarks.resolution",
        "benchmarks.quality",
        *["benchmarks.small_shapes"] * 2,
    ]
    done, calls = script("operator", "tests")
    assert (done.returncode, calls) == (0, ["gspn_dit.ops"])
    assert table(done.stdout) == {"build": "ok", "operator": "done before", "tests": "done before"}
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
    assert table(done.stdout) == {"build": "ok", "tests": "FAILED: exit status 3", "operator": "ok"}
    done, calls = script("tests", "operator")
    assert (done.returncode, calls) == (0, ["gspn_dit.ops", "pytest"])


def test_without_the_kernels_nothing_is_measured(script):
    done, calls = script("operator", FAILS="gspn_dit.ops")
    assert done.returncode == 1 and calls == ["gspn_dit.ops"]
    assert table(done.stdout)["operator"].startswith("NOT RUN: without the kernels")


def test_what_a_time_budget_has_stopped_is_unfinished(script):
    done, _ = script("resolution", SAYS="benchmarks.resolution", WORDS=f"DiT: {GO_ON}")
    assert done.returncode == 1 and table(done.stdout)["resolution"] == "UNFINISHED: run it again"
    done, calls = script("resolution")
    assert done.returncode == 0 and calls[-1] == "benchmarks.resolution"


def test_each_part_ends_within_its_seconds_and_says_what_it_has_left_out(script):
    begun = time.monotonic()
    done, _ = script("--seconds", "3", "budget", "operator", SLEEPS="benchmarks.block_budget")
    assert time.monotonic() - begun < 15
    found = table(done.stdout)
    assert done.returncode == 1 and found["operator"] == "ok"
    assert found[STEPS[3]] == "UNFINISHED: no time left" and found["depthwise"] == "NOT RUN: no time left"


def test_a_stopped_one_prints_its_table(script):
    environment = script.environment(SLEEPS="benchmarks.operator")
    with subprocess.Popen(
        ["bash", SCRIPT, script.out, "tests", "operator"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        while "benchmarks.operator" not in Path(environment["CALLS"]).read_text():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=10)
    assert process.returncode == 1 and table(said) == {"build": "ok", "tests": "ok"}


@pytest.mark.parametrize("arguments", [["kernels"], ["--seconds", "soon"], ["--seconds"], ["--state", "x"]])
def test_a_wrong_command_line_is_refused_before_anything(script, arguments):
    done, calls = script(*arguments)
    assert done.returncode == 2 and not calls and not script.out.exists()
    assert done.stderr.count("\n") == 1 and "usage: benchmarks/gpu.sh OUT" in done.stderr


def test_it_looks_for_the_words_of_what_is_unfinished():
    assert GO_ON.partition("; ")[2] in SCRIPT.read_text()
