"""What a GPU runs in a call: kernels by name, with their times."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def kernels_of(call: Callable[[], object], calls: int = 1) -> dict[str, tuple[float, float]]:
    """Launches and milliseconds of every kernel in a call, by name, the slowest first; the mean of some calls.

    torch.profiler leaves something behind that slows later calls: time what is to be timed before.
    """
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    launches: dict[str, int] = defaultdict(int)
    totals: dict[str, float] = defaultdict(float)
    for event in recorded.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation and event.name[:2] != "##":
            launches[event.name] += 1
            totals[event.name] += event.self_device_time_total / 1e3
    ordered = sorted(totals, key=lambda name: -totals[name])
    return {name: (launches[name] / calls, totals[name] / calls) for name in ordered}


def short_name(kernel: str) -> str:
    """The name of a kernel's function without its namespaces, template arguments and parameters."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"<| ?\(", name, maxsplit=1)[0].rpartition("::")[2]
