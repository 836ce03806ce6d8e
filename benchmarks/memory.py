"""How much memory a call takes, on a GPU and on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

LARGE = 2**16  # bytes
TRIM_THRESHOLD, MMAP_THRESHOLD, IS_MMAPPED, THP_DISABLE = -1, -3, 2, 41  # of glibc's malloc, and of sys/prctl.h
BYTES_PER_UNIT = 1024  # of /proc/self/status, which counts in kB of 1024


def peak_bytes(device: str, call: Callable[[], object]) -> int:
    """What a call adds at its peak: to CUDA's allocated memory, or to this process's resident memory.

    On a GPU the call's results are counted. On the CPU the call is slower than others (:func:`resident_is_in_use`).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with resident_is_in_use():
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it counts when it is taken again
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = resident("VmRSS")
        call()
        return max(resident("VmHWM") - before, 0)


@contextlib.contextmanager
def resident_is_in_use() -> Iterator[None]:
    """Make glibc take all that is large from the system block by block, in small pages, and give it back at once.

    Else free blocks that malloc keeps, and what huge pages hold beside a block, count with a peak: by chance, and up to
    twice over.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.mallopt(MMAP_THRESHOLD, LARGE)
    libc.prctl(THP_DISABLE, 1, 0, 0, 0)
    held = [libc.malloc(LARGE)]
    while not ctypes.c_size_t.from_address(held[-1] - ctypes.sizeof(ctypes.c_size_t)).value & IS_MMAPPED:
        held.append(libc.malloc(LARGE))  # the heap's free blocks, untouched, so that none is given out
    try:
        yield
    finally:  # thresholds as glibc sets them by itself once it has seen large blocks
        for block in held:
            libc.free(block)
        libc.prctl(THP_DISABLE, 0, 0, 0, 0)
        libc.mallopt(MMAP_THRESHOLD, 2**25)
        libc.mallopt(TRIM_THRESHOLD, 2**26)


def resident(line: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS, resident now; VmHWM, the most there was; RssAnon, private."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) for text in status if text.startswith(line)) * BYTES_PER_UNIT
