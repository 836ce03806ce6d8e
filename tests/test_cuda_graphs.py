"""gspn_dit/cuda_graphs.py: what a recording on a GPU does, here against stand-ins for torch's part of it."""

from contextlib import contextmanager

import pytest
import torch

from gspn_dit import cuda_graphs
from gspn_dit.cuda_graphs import CudaRecorder, reason_of, stream_of

CUDA = torch.device("cuda", 0)


class Stream:
    """A stream that notes whom it waited for."""

    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@pytest.fixture
def driver(monkeypatch):
    """torch.cuda without a GPU: the stream that is current, and a recording whose end fails if its body did."""

    class Driver:
        current = Stream()
        told = ()

        @contextmanager
        def stream(self, stream):
            before, self.current = self.current, stream
            try:
                yield
            finally:
                self.current = before

        @contextmanager
        def graph(self, graph, pool, stream, capture_error_mode):
            self.told = (pool, stream, capture_error_mode)
            self.current = stream  # torch brings the one before back only if the end goes well
            try:
                yield
            except BaseException:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None

        left = ()

    made = Driver()

    class Graph:
        replays = 0

        def replay(self):
            self.replays += 1

    for name, value in {
        "Stream": Stream,
        "graph_pool_handle": lambda: "the pool",
        "current_stream": lambda device=None: made.current,
        "stream": made.stream,
        "device": lambda device: made.stream(made.current),
        "graph": made.graph,
        "CUDAGraph": Graph,
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_graphs, "leave_failed", lambda *failed: setattr(made, "left", failed))
    stream_of.cache_clear()
    yield made
    stream_of.cache_clear()


def test_rehearsals_are_on_the_recordings_stream_and_waited_for(driver):
    recorder, usual = CudaRecorder(CUDA), driver.current
    assert recorder.rehearse(lambda: driver.current) is recorder.stream
    assert driver.current is usual
    assert recorder.stream.waited == [usual] and usual.waited == [recorder.stream]


def test_all_recordings_of_a_gpu_are_on_one_stream(driver):
    assert CudaRecorder(CUDA).stream is CudaRecorder(CUDA).stream is not CudaRecorder(torch.device("cuda", 1)).stream


def test_recordings_share_memory_and_hold_only_their_own_thread(driver):
    recorder = CudaRecorder(CUDA)
    result, replay = recorder.record(lambda: 7)
    assert result == 7 and driver.told == ("the pool", recorder.stream, "thread_local") and not driver.left
    replay()
    assert replay.__self__.replays == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("operation not permitted\nstack"), "operation not permitted"),
        (TypeError("operation not permitted"), "TypeError: operation not permitted"),
    ],
)
def test_a_recording_that_fails_says_why_and_leaves_the_stream_as_it_was(driver, error, said):
    recorder, usual = CudaRecorder(CUDA), driver.current

    def work():
        raise error

    with pytest.raises(RuntimeError, match=rf"^{said}$"):
        recorder.record(work)
    assert driver.current is usual
    assert driver.left == (CUDA, recorder.stream, "the pool")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("first\nsecond"), "first"),
        (ValueError("\n  late"), "ValueError: late"),
        (OSError(), "OSError"),
    ],
)
def test_a_reason_is_one_line(error, reason):
    assert reason_of(error) == reason


@pytest.mark.gpu
def test_a_replay_reads_what_lies_in_its_places():
    recorder = CudaRecorder(torch.device("cuda"))
    place = torch.ones(4, device="cuda")
    recorder.rehearse(lambda: place * 2)
    result, replay = recorder.record(lambda: place * 2)
    place.fill_(5)
    replay()
    assert result.tolist() == [10.0] * 4
    with pytest.raises(RuntimeError):
        recorder.record(lambda: place.sum().item())
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.manual_seed(0)
    assert torch.rand(8, device="cuda").unique().numel() == 8  # torch would refuse to draw while it records
    replay()
    assert result.tolist() == [10.0] * 4
