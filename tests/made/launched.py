"""Real processes under `accelerate launch`, on the CPU, to be waited for or killed.

To start Python and to import torch and the package takes such processes longer than their work. Where a test asks what
several processes compute, or what is left when they are stopped or killed, and not how they are started, `WarmLaunch`
and `run_warm` fork launcher and processes from one that has imported all that.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from made.faults import _context as warm
from made.faults import begin

ROOT = Path(__file__).parents[2]
TRAIN_MANY = str(ROOT / "tests" / "made" / "train_many.py")
# torch 2.8, on the CPU: gloo gives FSDP2 the sum of gradients for their mean, and compiled blocks that are recomputed
# corrupt memory (blocks without scans too). Neither with 2.11.
SOUND = torch.__version__ >= "2.11"
MANY = ("--multi_gpu",)  # accelerate's launcher of several processes, on the CPU too
FSDP = ("--config_file", str(ROOT / "configs" / "accelerate" / "fsdp.yaml"))
LAUNCHERS = [
    pytest.param(MANY, id="ddp"),
    pytest.param(FSDP, id="fsdp2", marks=pytest.mark.skipif(not SOUND, reason="gloo gives the sum for the mean")),
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def settings(processes: int, launcher: Sequence[object]) -> list[object]:
    """The launcher's own options."""
    plain = "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0
    return [*launcher, "--num_processes", processes, *plain]


def launch(processes: int, *arguments: object) -> subprocess.Popen:
    """Start a script, or `-m` a module, with its arguments on that many processes, one thread each."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings(processes, MANY), *arguments]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


class WarmLaunch:
    """Launcher and processes, forked from one that has imported all they need; to be handled as a `Popen` is."""

    def __init__(self, processes: int, script: object, *arguments: object, launcher: Sequence[object] = MANY) -> None:
        self._printed = tempfile.NamedTemporaryFile()  # noqa: SIM115  it is there as long as this is
        argv = [str(part) for part in (*settings(processes, launcher), script, *arguments)]
        self._process = warm.Process(target=_launch, args=(argv, self._printed.name))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, None]:
        self._process.join(timeout)
        hangs = self.returncode is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # with its processes
        printed = Path(self._printed.name).read_text()
        assert not hangs, printed
        return printed, None


def run_warm(processes: int, script: object, *arguments: object, launcher: Sequence[object] = MANY) -> str:
    """What a script prints on that many forked processes, one thread each; it has to end with status 0."""
    launched = WarmLaunch(processes, script, *arguments, launcher=launcher)
    printed, _ = launched.communicate(timeout=480)
    assert launched.returncode == 0, printed
    return printed


def _launch(argv: list[str], printed: str) -> None:
    from accelerate.commands import launch
    from torch.distributed import run as torchrun

    begin()
    os.setsid()
    os.chdir(ROOT)
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    output = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run = torchrun.run

    def run_forked(args):
        args.run_path, args.start_method = True, "fork"
        run(args)

    torchrun.run, torchrun.run_script_path = run_forked, _run_script
    launch.launch_command(launch.launch_command_parser().parse_args(argv))


def _run_script(script: str, *argv: str) -> None:
    sys.argv = [script, *argv]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:  # the launcher waits until a function returns, or fails
        if ended.code:
            raise


def run_apart(program: str, folder: Path) -> None:
    """Run Python in a folder, in a forked process of its own; it has to end well."""
    process = warm.Process(target=_run_in, args=(folder, program))
    process.start()
    process.join(240)
    ended = process.exitcode
    process.kill()
    assert ended == 0


def _run_in(folder: Path, program: str) -> None:
    begin()
    os.chdir(folder)
    exec(program, {})


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
    printed = run_warm(2, TRAIN_MANY, folder / "runs.json", launcher=launcher)
    assert printed.count("2 × cpu") == len(runs)
    assert "Grad strides" not in printed  # DDP's word on what nobody here can mend


def kill_one_process(process: WarmLaunch, rank: int, when: Callable[[], bool]) -> None:
    """SIGKILL the process of that rank when it is time, and wait until the launcher has ended the others."""
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, f"it ended before it could be killed: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda child: (child.create_time(), child.pid))
    ranks[rank].send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
