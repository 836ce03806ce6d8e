"""How long calls take: wall time on the CPU, device time and dispatch time on a GPU."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gspn_dit.cuda_graphs import leave_failed

Call = Callable[[], object]
FEWEST, SECONDS_OF_REPEATS = 3, 3.0  # calls that `paced` times: so many at least, and more while there are seconds left
LONGEST_REPEATED = 20.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call.

    Args:
        device_ms: Median of replays of CUDA graphs, in which nothing waits for Python.
        eager_ms: Mean of calls from Python, back to back, as training without graphs makes them.
        captured: Whether there are graphs of it; if not, device_ms too is of calls from Python.
        refusal: Why not.
    """

    device_ms: float
    eager_ms: float
    captured: bool
    refusal: str | None = None


def timed(calls: Sequence[Call], repeats: int, graphs: bool = True) -> Timing:
    """The time of a call on a GPU, of `repeats`; `calls` do the same on different inputs, and take turns."""
    eager = eager_ms(calls, repeats)
    if not graphs:
        return Timing(device_ms(calls, repeats), eager, False)
    try:
        replays = [captured(call) for call in calls]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize()
        return Timing(device_ms(calls, repeats), eager, False, str(error).splitlines()[0])
    return Timing(device_ms(replays, repeats), eager, True)


def graph_ms(calls: Sequence[Call], repeats: int) -> float:
    """The device time of a call alone; says on stderr where it is of calls from Python."""
    timing = timed(calls, repeats)
    if not timing.captured:
        print(f"timed from Python, for no CUDA graph could be made of it: {timing.refusal}", file=sys.stderr)
    return timing.device_ms


def captured(call: Call) -> Call:
    """The replay of a CUDA graph of the call, whose inputs and results stay where they are."""
    stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(stream)
    with torch.cuda.stream(side):  # as torch wants it before a capture
        call()
    stream.wait_stream(side)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            call()
    except RuntimeError:  # older torch then stays in the capture: in its stream, its memory, its random numbers
        torch.cuda.set_stream(stream)
        leave_failed(stream.device, side, pool)
        raise
    return graph.replay


def device_ms(calls: Sequence[Call], repeats: int) -> float:
    """Median device time of a call, after one of each that does not count."""
    for call in calls:
        call()
    torch.cuda._sleep(10_000_000)  # some milliseconds, in which the host gets ahead of the device
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, end) in enumerate(events):
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def eager_ms(calls: Sequence[Call], repeats: int) -> float:
    """Mean wall time of calls back to back, after one of each that does not count: the host's time or the device's."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(repeats):
        calls[i % len(calls)]()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeats


def wall_ms(call: Call, repeats: int) -> float:
    """Median wall time of a call in milliseconds, after one that does not count; on the CPU."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def steady_ms(device: str, call: Call, repeats: int) -> float:
    """Milliseconds of a call without what disturbs it: the median of three medians, on a GPU of replayed graphs.

    On a GPU it comes before profiling, which leaves something behind that slows later calls.
    """
    if device == "cuda":
        return graph_ms([call], repeats)
    return statistics.median(wall_ms(call, repeats) for _ in range(3))


def paced(device: str, call: Call, most: int) -> dict[str, float]:
    """Median, least and most wall seconds of a call, and how many were timed.

    At least FEWEST, and up to `most` while their sum is below SECONDS_OF_REPEATS; of calls longer than
    LONGEST_REPEATED one.
    """
    seconds: list[float] = []
    while sum(seconds) < LONGEST_REPEATED and (
        len(seconds) < FEWEST or (len(seconds) < most and sum(seconds) < SECONDS_OF_REPEATS)
    ):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "repeats": len(seconds),
    }
