"""CUDA graphs: what a function launches is recorded once, and launched again by a single call.

A replay runs the same kernels on the same addresses. So a recording reads and writes tensors that stay where they are:
its inputs are copied into their own places, weights are read where they lie, changed or not, and its results are
written over by the next replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Recorder(Protocol):
    """Records what a function does on a device."""

    def rehearse(self, work: Callable[[], T]) -> T:
        """Do it as a recording will, so that what is made only once is made before."""
        ...

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What the function returns, of which each replay writes the values anew, and the replay.

        Nothing is computed yet. Raises RuntimeError for a function that cannot be recorded.
        """
        ...


class CudaRecorder:
    """Records on one GPU. Its recordings share their memory: what one returns is gone when another is replayed.

    Only this thread is held to what a recording allows: others, which read data or pin memory, go on.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def rehearse(self, work: Callable[[], T]) -> T:
        """Do it on the stream of the recordings, which a library keeps its working memory by."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        torch.cuda.synchronize(self.device)  # its memory may be given to either stream from here on
        return result

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """As :meth:`Recorder.record`."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        recording = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        # The outer block brings this stream back if the recording fails in its end.
        with torch.cuda.device(self.device), torch.cuda.stream(current), recording:
            result = work()
        return result, graph.replay


def reason_of(error: BaseException) -> str:
    """Why a recording failed, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
