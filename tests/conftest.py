"""Two cores are shared by everything the suite starts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import pytest
import torch


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    """Benchmarks choose their threads; the losses of later tests are compared with those of other processes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
