"""Where a block's time goes: every operation of one gspn-dit block against the time its FLOPs and bytes need at least.

`python -m benchmarks.block_budget [--device cuda] [--name gspn-dit-s-2] [--step training] [--out FILE.md]` profiles a
forward, or a forward and backward, of one block with torch.profiler, eager and compiled. The floor of an operation is
the longer of its FLOPs at the fastest matrix product measured here and its bytes (operands once, result once) at the
fastest copy of a tensor of the map's size, which stays in cache as far as the block's own tensors do.

On a GPU the passes of `gspn_dit.layers.fused` are operations of their own, `gspn_dit::modulated_norm` and so on, and
kernels named `norm_forward`, `squared_relu_forward`, `conv_forward`; GSPN_DIT_FUSED=0 has the budget without them.
"""

from __future__ import annotations

from benchmarks.commands import BlockBudgetOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("block_budget"))

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.machine import machine
from benchmarks.random_model import random_model
from benchmarks.result_files import write_report
from benchmarks.tables import header, row
from benchmarks.timing import steady_ms
from gspn_dit.models.compiled_blocks import compile_block

CALLS = 20
PRODUCTS = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}  # sides of the matrices of the fastest product
MIXING = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product", "gspn_dit::propagate")
SHOWN = {"cpu": 0.005, "cuda": 0.001}  # milliseconds; compiled kernels that take less are left out


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
        if not func.is_view and not any(free in func.name() for free in ("empty", "_unsafe_view", "detach")):
            cost = self.by_name[func.name().split(".")[0]]
            flops = flop_registry.get(func.overloadpacket)
            cost.calls += 1
            if func is torch.ops.aten.convolution_backward.default:  # torch's count forgets the groups
                (grad, _, weight), computed = args[:3], args[-1]
                cost.flops += 2 * sum(computed[:2]) * grad.numel() * weight[0].numel()
            elif flops:
                cost.flops += flops(*args, **(kwargs or {}), out_val=result)
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            cost.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def block_call(options: Options, compiled: bool) -> Callable[[], Tensor]:
    """One forward, or forward and backward, of the model's first block on random tokens, with random weights."""
    training, dtype = options.step == "training", getattr(torch, options.dtype)
    autocast = torch.autocast(options.device, dtype, enabled=training and dtype != torch.float32)
    side, inputs = options.pixels // 8, []
    with torch.device(options.device):
        model = random_model(options.name, options.device, dtype=None if training else dtype)
        handle = model.blocks[0].register_forward_pre_hook(lambda block, args: inputs.extend(args))
        latents = torch.randn(options.batch, 4, side, side, dtype=torch.float32 if training else dtype)
        with torch.no_grad(), autocast:
            model(latents, 1000 * torch.rand(options.batch), torch.randint(1000, (options.batch,)))
        handle.remove()
    block: nn.Module = model.blocks[0]
    if compiled:
        compile_block(block, options.compile_mode)
    if not training:
        return torch.no_grad()(lambda: block(*inputs))
    inputs = [value.detach().requires_grad_() if isinstance(value, Tensor) else value for value in inputs]
    wanted = [*(value for value in inputs if isinstance(value, Tensor)), *block.parameters()]
    grad = torch.randn_like(inputs[0])

    def step() -> Tensor:
        with autocast:
            y = block(*inputs)
        torch.autograd.grad(y, wanted, grad.to(y.dtype))
        return y.detach()

    return step


def profiled(options: Options, call: Callable[[], Tensor]) -> EventList:
    """The events of CALLS calls."""
    for _ in range(3):
        call()
    on_gpu = [ProfilerActivity.CUDA] if options.device == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as recorded:
        for _ in range(CALLS):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    return recorded.events()


def by_operation(options: Options, events: EventList, names: set[str]) -> dict[str, float]:
    """Milliseconds a call of the named operations: each with all it calls, for those are not counted by themselves."""
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        owner, each = None, event
        while each is not None:
            owner, each = each if each.name in names else owner, each.cpu_parent
        if owner is not None:
            own = event.self_device_time_total if options.device == "cuda" else event.self_cpu_time_total
            totals[owner.name] += own / CALLS / 1e3
    return totals


def by_kernel(options: Options, events: EventList) -> dict[str, float]:
    """Milliseconds a call of what torch.compile made: kernels of a GPU, on the CPU functions and operations."""
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        if options.device == "cpu":
            totals[event.name] += event.self_cpu_time_total / CALLS / 1e3
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation and event.name[:2] != "##":
            totals[event.name] += event.self_device_time_total / CALLS / 1e3
    return totals


def fastest_product(options: Options, dtype: torch.dtype) -> float:
    """FLOPs a second of the fastest of some square matrix products."""
    rates = []
    for n in PRODUCTS[options.device]:
        a, b = (torch.randn(n, n, dtype=dtype, device=options.device) for _ in range(2))
        rates.append(2e3 * n**3 / steady_ms(options.device, lambda a=a, b=b: a @ b, CALLS))
    return max(rates)


def fastest_copy(options: Options, like: Tensor) -> float:
    """Bytes a second, read and written, of copies of a tensor."""
    target = torch.empty_like(like)
    return 2e3 * like.numel() * like.element_size() / steady_ms(options.device, lambda: target.copy_(like), CALLS)


def tables(options: Options) -> list[str]:
    """The budget of the eager block, then the kernels of the compiled one."""
    call = block_call(options, compiled=False)
    with Costs() as costs:
        result = call()
    flop_rate = fastest_product(options, getattr(torch, options.dtype))
    byte_rate = fastest_copy(options, result)
    eager = steady_ms(options.device, call, CALLS)
    compiled_call = block_call(options, compiled=True)
    compiled = steady_ms(options.device, compiled_call, CALLS)
    times = by_operation(options, profiled(options, call), set(costs.by_name))
    lines = header(["operation, eager", "calls", "ms", "MFLOP", "MB", "floor, ms", "over its floor"])
    floors = besides = floors_besides = 0.0
    for name, cost in sorted(costs.by_name.items(), key=lambda item: -times.get(item[0], 0.0)):
        floor = 1e3 * max(cost.flops / flop_rate, cost.bytes / byte_rate)
        if floor == 0:  # it touches no data: a question about a dtype, say
            continue
        floors += floor
        ms = times.get(name, 0.0)
        if not name.startswith(MIXING):
            besides, floors_besides = besides + ms, floors_besides + floor
        lines.append(budget_row(name.removeprefix("aten::"), cost, ms, floor))
    every = Cost(*(sum(getattr(cost, key) for cost in costs.by_name.values()) for key in ("calls", "flops", "bytes")))
    lines.append(row(["all but products and mixing", "", f"{besides:.3f}", "", "", f"{floors_besides:.3f}", ""]))
    lines += [budget_row("all", every, eager, floors), ""]
    if options.device == "cpu":  # kernels that tell the profiler of themselves, which takes them time
        torch.compiler.reset()
        with inductor.patch("cpp.enable_kernel_profile", True):
            kernels = by_kernel(options, profiled(options, block_call(options, compiled=True)))
    else:
        kernels = by_kernel(options, profiled(options, compiled_call))
    shown = [item for item in kernels.items() if item[1] > SHOWN[options.device]]
    lines += header(["kernel, compiled", "ms"])
    lines += [row([f"`{name[:100]}`", f"{ms:.3f}"]) for name, ms in sorted(shown, key=lambda item: -item[1])]
    lines += [row(["all", f"{compiled:.3f}"]), ""]
    lines.append(
        f"`{options.name}`, {options.pixels} px, batch {options.batch}, {options.dtype}, {options.step} of the first "
        f"block, compiled in the mode {options.compile_mode}. The fastest product: {flop_rate / 1e9:.0f} GFLOP/s; the "
        f"fastest copy of the map: "
        f"{byte_rate / 1e9:.0f} GB/s. All FLOPs at that rate: {1e3 * every.flops / flop_rate:.3f} ms."
    )
    return lines


def budget_row(name: str, cost: Cost, ms: float, floor: float) -> str:
    """A row of the eager block's table."""
    megas = f"{cost.flops / 1e6:.0f}", f"{cost.bytes / 1e6:.1f}"
    return row([name, cost.calls, f"{ms:.3f}", *megas, f"{floor:.3f}", f"{ms / floor:.1f}×"])


def main(options: Options) -> None:
    """Print where the time of one block goes."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    write_report(tables(options), machine(options.device), options.out)
