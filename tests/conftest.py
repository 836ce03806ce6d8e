"""Two cores are shared by everything the suite starts."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import pytest
import torch
from accelerate.state import AcceleratorState
from made.store import make_store

from gspn_dit.messages import plain_messages


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    """Benchmarks choose their threads; the losses of later tests are compared with those of other processes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def fresh_accelerate():
    """A process has one accelerator for life; with this, several runs share a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def devices_stay(monkeypatch):
    """Where the code under test is wrong and this is root, a test could put a file in a device's place: not here."""

    def replace(path, target):
        assert not str(target).startswith("/dev/")
        os.replace(path, target)

    monkeypatch.setattr(Path, "replace", replace)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A small store of made latents."""
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture
def as_a_command_says_it():
    """What a function that a test calls says is printed, and its warnings are lines, as where a command calls it."""
    with plain_messages():
        yield
