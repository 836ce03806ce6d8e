"""Where a block's time goes: every operation of one gspn-dit block against the time its FLOPs and bytes need at least.

`python -m benchmarks.block_budget [--name gspn-dit-s-2] [--pixels 256] [--batch 4] [--out FILE.md]` profiles the
forward of one block on the CPU with torch.profiler, eager and compiled. The floor of an operation is the longer of its
FLOPs at the fastest matrix product measured here and its bytes (operands once, result once) at the fastest copy of a
tensor of the map's size, which stays in cache as the block's own tensors do.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.machine import machine
from benchmarks.operator import median_ms
from benchmarks.resolution_case import Case, random_model
from gspn_dit.options import command, require

CALLS = 20


@dataclass
class Options:
    """Args:
    name: A model of the families gspn-dit and dit.
    pixels: Side of the images.
    batch: Images.
    dtype: Of weights and map.
    threads: Threads of the CPU.
    out: Also write the tables to this Markdown file.
    """

    name: str = "gspn-dit-s-2"
    pixels: int = 256
    batch: int = 4
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    threads: int = 2
    out: str | None = None

    def __post_init__(self) -> None:
        for key in ("pixels", "batch", "threads"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")


@dataclass
class Cost:
    """What one call of a block does in all operations of a name."""

    calls: int = 0
    flops: int = 0
    bytes: int = 0


class Costs(TorchDispatchMode):
    """Counts calls, FLOPs and bytes of every operation by name; views and what allocates cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, Cost] = defaultdict(Cost)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not any(free in func.name() for free in ("empty", "_unsafe_view")):
            cost = self.by_name[func.name().split(".")[0]]
            flops = flop_registry.get(func.overloadpacket)
            cost.calls += 1
            cost.flops += flops(*args, **(kwargs or {}), out_val=result) if flops else 0
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            cost.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def block_call(options: Options, compiled: bool) -> Callable[[], Tensor]:
    """One call of the model's first block on random tokens, with random weights."""
    case = Case("", options.name, "forward", options.pixels, options.batch, options.dtype, False)
    model = random_model(case)
    side = options.pixels // 8
    block, inputs = model.blocks[0], {}

    def keep(module: nn.Module, args: tuple) -> None:
        inputs["args"] = args

    handle = block.register_forward_pre_hook(keep)
    dtype = getattr(torch, options.dtype)
    with torch.no_grad():
        model(torch.randn(options.batch, 4, side, side, dtype=dtype), 1000 * torch.rand(options.batch),
              torch.randint(1000, (options.batch,)))  # fmt: skip
    handle.remove()
    if compiled:
        block.compile(dynamic=False)
    return torch.no_grad()(lambda: block(*inputs["args"]))


def profiled(call: Callable[[], Tensor]) -> dict[str, float]:
    """Milliseconds a call that each operation takes by itself, without those it calls."""
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(CALLS):
            call()
    return {event.key: event.self_cpu_time_total / CALLS / 1e3 for event in recorded.key_averages()}


def fastest_product(dtype: torch.dtype) -> float:
    """FLOPs a second of the fastest of some square matrix products."""
    rates = []
    for n in (512, 1024, 2048):
        a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
        rates.append(2 * n**3 / median_ms(lambda a=a, b=b: a @ b, 10) * 1e3)
    return max(rates)


def fastest_copy(like: Tensor) -> float:
    """Bytes a second, read and written, of copies of a tensor."""
    target = torch.empty_like(like)
    return 2e3 * like.numel() * like.element_size() / median_ms(lambda: target.copy_(like), 200)


def tables(options: Options) -> list[str]:
    """The budget of the eager block, then the kernels of the compiled one."""
    call = block_call(options, compiled=False)
    with Costs() as costs:
        result = call()
    flop_rate, byte_rate = fastest_product(result.dtype), fastest_copy(result)
    times = profiled(call)
    eager = statistics.median(median_ms(call, CALLS) for _ in range(3))
    lines = [
        "| operation, eager | calls | ms | MFLOP | MB | floor, ms | over its floor |",
        "|---|---|---|---|---|---|---|",
    ]
    floors = 0.0
    # an operation that calls others is there with what it does itself: its parts' time is added to it by name
    for name, cost in sorted(costs.by_name.items(), key=lambda item: -times_of(item[0], times)):
        floor = 1e3 * max(cost.flops / flop_rate, cost.bytes / byte_rate)
        if floor == 0:  # it touches no data: a question about a dtype, say
            continue
        floors += floor
        ms = times_of(name, times)
        lines.append(f"| {name.removeprefix('aten::')} | {cost.calls} | {ms:.3f} | {cost.flops / 1e6:.0f} "
                     f"| {cost.bytes / 1e6:.1f} | {floor:.3f} | {ms / floor:.1f}× |")  # fmt: skip
    flops = sum(cost.flops for cost in costs.by_name.values())
    lines += [f"| all | | {eager:.3f} | {flops / 1e6:.0f} | {sum(c.bytes for c in costs.by_name.values()) / 1e6:.1f} "
              f"| {floors:.3f} | {eager / floors:.1f}× |", ""]  # fmt: skip
    inductor.cpp.enable_kernel_profile = True
    call = block_call(options, compiled=True)
    times = profiled(call)
    inductor.cpp.enable_kernel_profile = False
    torch.compiler.reset()
    clean = block_call(options, compiled=True)
    compiled = statistics.median(median_ms(clean, CALLS) for _ in range(3))
    lines += ["| kernel, compiled | ms |", "|---|---|"]
    lines += [f"| `{name}` | {ms:.3f} |" for name, ms in sorted(times.items(), key=lambda item: -item[1]) if ms > 0.005]
    lines += [f"| all | {compiled:.3f} |", ""]
    lines.append(
        f"`{options.name}`, {options.pixels} px, batch {options.batch}, {options.dtype}, a forward of the first block. "
        f"The fastest product: {flop_rate / 1e9:.0f} GFLOP/s; the fastest copy of the map: {byte_rate / 1e9:.0f} GB/s. "
        f"All FLOPs at that rate: {1e3 * flops / flop_rate:.3f} ms. {machine()}"
    )
    return lines


PARTS = {"aten::convolution": ("aten::mkldnn_convolution", "aten::_convolution", "aten::_conv_depthwise2d"),
         "gspn_dit::propagate": ("gspn_dit_cpu::propagate",),
         "aten::_to_copy": ("aten::to", "aten::copy_"),
         "aten::clone": ("aten::contiguous",)}  # fmt: skip


def times_of(name: str, times: dict[str, float]) -> float:
    """An operation's time with that of the operations it is made of."""
    return sum(times.get(part, 0.0) for part in (name, *PARTS.get(name, ())))


def main(options: Options) -> None:
    """Print where the time of one block goes."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report = "\n".join(tables(options))
    print(report)
    if options.out:
        Path(options.out).write_text(report + "\n")


if __name__ == "__main__":
    command(main, Options, prog="python -m benchmarks.block_budget")
