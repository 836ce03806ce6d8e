"""Commands in child processes to which something bad happens. The children are forked from one warm process."""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from gspn_dit.config import Config
from gspn_dit.options import command
from gspn_dit.training import checkpoints, loop

_context = multiprocessing.get_context("forkserver")
# What the children import as they go: it takes each of them longer than its work.
_context.set_forkserver_preload(
    [
        "gspn_dit.training.loop",
        "gspn_dit.training.diffusion",
        "gspn_dit.training.classification",
        "gspn_dit.training.distillation",
        "gspn_dit.data.encode",
        "gspn_dit.evaluation.evaluate",
        "gspn_dit.inference.sample",
        "accelerate.commands.launch",
        "jsonargparse",
        "matplotlib.figure",
        "torch.distributed.run",
    ]
)


def begin():
    """In a fork: it starts processes as one does that a person started, and not by a server of its own."""
    multiprocessing.set_start_method(None, force=True)


def start(argv, log, fault=None, *arguments, kind=Config):
    """A process, leader of its own group, that trains after a fault was prepared in it; it writes to the log."""
    process = _context.Process(target=_train, args=(kind, argv, str(log), fault, *arguments))
    process.start()
    return process


def start_command(main, kind, argv):
    """A process of one thread that runs a command: `main`, as `module:function`, on options of that kind."""
    process = _context.Process(target=_run_command, args=(main, kind, argv))
    process.start()
    return process


def finished(process):
    """Its exit status, -9 if it was killed."""
    process.join(60)
    status = process.exitcode
    process.kill()
    return status


def killed_at(call):
    """SIGKILL while a checkpoint is written: at the n-th file, or in the removal of an old one."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if call == "removal":
        shutil.rmtree = die
        return
    save, calls = checkpoints.save_tensors, []

    def save_tensors(tensors, path, *rest):
        save(tensors, path, *rest)
        calls.append(path)
        if len(calls) == call:
            os.truncate(path, os.path.getsize(path) // 2)  # what has reached the disk of it
            die()

    checkpoints.save_tensors = save_tensors


def limited_to(bytes_a_file):
    """A disk that takes no more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))


def asleep_in(name):
    """A part of the training loop that says where it is and never ends."""

    def sleep(*_, **__):
        print(f"in {name}", flush=True)
        time.sleep(600)

    setattr(loop, name, sleep)


def worker_killed(step):
    """The processes that read data die at a step, as the kernel kills what takes too much memory."""
    rate = loop.learning_rate_at

    def killing(now, options):
        if now == step:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
        return rate(now, options)

    loop.learning_rate_at = killing


def _train(kind, argv, log, fault, *arguments):
    begin()
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may be deaf to it
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)
    if fault is not None:
        fault(*arguments)
    command(loop.main, kind, prog="train_dit.py", argv=argv)


def _run_command(main, kind, argv):
    begin()
    torch.set_num_threads(1)
    command(main, kind, prog="command", argv=argv)


def text(log):
    return Path(log).read_text() if Path(log).exists() else ""
