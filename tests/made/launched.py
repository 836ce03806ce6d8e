"""Real processes under `accelerate launch`, on the CPU, to be waited for or killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).parents[2]
TRAIN_MANY = str(ROOT / "tests" / "made" / "train_many.py")
# torch 2.8, on the CPU: gloo gives FSDP2 the sum of gradients for their mean, and compiled blocks that are recomputed
# corrupt memory (blocks without scans too). Neither with 2.11.
SOUND = torch.__version__ >= "2.11"
FSDP = ("--config_file", str(ROOT / "configs" / "accelerate" / "fsdp.yaml"))
LAUNCHERS = [
    pytest.param(("--multi_gpu",), id="ddp"),
    pytest.param(FSDP, id="fsdp2", marks=pytest.mark.skipif(not SOUND, reason="gloo gives the sum for the mean")),
]


def launch(
    processes: int, *arguments: object, launcher: Sequence[object] | None = None, **options: object
) -> subprocess.Popen:
    """Start a script, or `-m` a module, with its arguments on that many processes, one thread each.

    `--multi_gpu` is accelerate's launcher of several processes, on the CPU too: with `--cpu` it starts one, whatever
    `--num_processes` says.
    """
    launcher = launcher or ["--multi_gpu" if processes > 1 else "--cpu"]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", *launcher, "--num_processes", processes),
        *("--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0),
        *arguments,
    ]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **options,
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Wait for it to end with that status; what it printed."""
    try:
        printed, _ = process.communicate(timeout=480)
    finally:
        process.terminate()  # which takes its processes along, if it hangs
    assert process.returncode == status, printed
    return printed


def train_many(folder: Path, runs: Sequence[tuple[str, Sequence[str]]], launcher: Sequence[object]) -> None:
    """Train runs, each given by the class of its configuration and its options, one after the other in two processes.

    Args:
        folder: Where they are noted down.
    """
    (folder / "runs.json").write_text(json.dumps(runs))
    printed = finish(launch(2, TRAIN_MANY, folder / "runs.json", launcher=launcher))
    assert printed.count("2 × cpu") == len(runs)
    assert "Grad strides" not in printed  # DDP's word on what nobody here can mend


def kill_one_process(process: subprocess.Popen, rank: int, when: Callable[[], bool]) -> None:
    """SIGKILL the process of that rank when it is time, and wait until the launcher has ended the others."""
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, f"it ended before it could be killed: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    family = psutil.Process(process.pid).children(recursive=True)
    of_rank = [child for child in family if child.environ().get("RANK", "0") == str(rank)]
    min(of_rank, key=lambda child: child.create_time()).send_signal(signal.SIGKILL)  # the others read data for it
    process.communicate(timeout=120)
    assert process.returncode != 0
