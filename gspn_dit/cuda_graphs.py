"""CUDA graphs: what a function launches is recorded once, and launched again by a single call.

A replay runs the same kernels on the same addresses. So a recording reads and writes tensors that stay where they are:
its inputs are copied into their own places, weights are read where they lie, changed or not, and its results are
written over by the next replay.
"""

from __future__ import annotations

import contextlib
import functools
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
        self.stream = stream_of(device)
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
        problem: Exception | None = None
        try:
            # The block around it brings this stream back, which a recording that fails in its end would not.
            with torch.cuda.device(self.device), torch.cuda.stream(current), recording:
                try:
                    result = work()
                except Exception as error:
                    problem = error
                    raise
        except Exception as error:  # the end of a recording fails too, and says nothing of why
            leave_failed(self.device, self.stream, self.pool)
            raise RuntimeError(reason_of(problem or error)) from error
        return result, graph.replay


@functools.cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a GPU's recordings: libraries keep working memory for every stream that they have seen."""
    return torch.cuda.Stream(device)


def leave_failed(device: torch.device, stream: torch.cuda.Stream, pool: tuple[int, int]) -> None:
    """End a recording on a stream whose end has failed: torch before 2.12 stays in it, with its memory and its draws.

    Left like that, torch draws no more random numbers on the device, and frees no memory that several streams have had.
    """
    with torch.cuda.device(device):
        with contextlib.suppress(AttributeError, RuntimeError):  # newer torch has done it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        one = torch.ones(1, device=device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            one.add_(1)  # a recording that ends well ends the one before for the generator


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0][:200] if isinstance(error, RuntimeError) else f"{type(error).__name__}: {lines[0][:200]}"
