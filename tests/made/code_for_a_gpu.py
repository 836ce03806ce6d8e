"""The code that torch.compile generates for an H100 that is not here: `python -m made.code_for_a_gpu WHAT …` prints it.

WHAT is `block`, one of gspn-dit-xl-2 at 256 px in bfloat16, or `tuned`, its feed-forward half as the mode max-autotune
has it where Triton's templates are the fastest; a line `### WHAT` stands before each. Nothing is launched or timed:
what torch 2.14 asks of a GPU is answered here.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch._inductor.config as inductor
import torch._inductor.fx_passes.fuse_attention as fuse_attention
import torch._inductor.fx_passes.misc_patterns as misc_patterns
import torch._inductor.fx_passes.pad_mm as pad_mm
import triton
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.graph import GraphLowering
from torch._inductor.select_algorithm import AlgorithmSelectorCache
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

import gspn_dit.ops.passes.operators  # noqa: F401
from gspn_dit.models import create_model
from gspn_dit.models.compiled_blocks import compile_block
from gspn_dit.ops import passes

H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=2**16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block_optin=232_448,
    gcnArchName="",
)
TRITONS_DRIVER = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, is_active=lambda: True
)
codes: list[str] = []


class Enough(Exception):
    """The code is there."""


def keep(graph: GraphLowering) -> NoReturn:
    """In place of loading the code that was generated."""
    code, _ = graph.codegen()
    codes.append(code.value)
    raise Enough


def pretend() -> None:
    """Answer what torch asks of a GPU."""
    passes.runs_kernels = torch.compiler.assume_constant_result(lambda device: True)
    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "is_current_stream_capturing": lambda: False,
            "set_device": lambda device: None,
            "get_device_properties": lambda device=None: H100,
            "get_device_capability": lambda device=None: (9, 0),
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: None,
            "_lazy_init": lambda: None,
            "_exchange_device": lambda index: 0,
            "_maybe_exchange_device": lambda index: index,
        },
        torch.accelerator: {"is_available": lambda: False, "current_device_index": lambda: 0},
        CudaInterface: {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_compute_capability": lambda device=None: 90,
            "get_device_properties": lambda device=None: H100,
            "is_triton_capable": lambda device=None: True,
            "raise_if_triton_unavailable": lambda device=None: None,
        },
        CudaInterface.Worker: {
            "current_device": lambda: 0,
            "get_device_properties": lambda device=None: H100,
        },
    }
    for owner, functions in answers.items():
        for name, function in functions.items():
            setattr(owner, name, staticmethod(function) if isinstance(owner, type) else function)
    for module, name in (  # patterns are traced with tensors of the device
        (fuse_attention, "_sfdp_init"),
        (pad_mm, "_pad_mm_init"),
        (misc_patterns, "_misc_patterns_init"),
    ):
        setattr(module, name, lambda *_: None)
    triton.runtime.driver.set_active(TRITONS_DRIVER)
    GraphLowering.compile_to_module = keep
    AlgorithmSelectorCache.pick_deterministic_choice = lambda self, choices: next(
        choice for choice in choices if "triton" in choice.name
    )


def generate(module: nn.Module, mode: str, *inputs: Tensor | int) -> str:
    """What Inductor generates for a forward."""
    with torch.no_grad(), inductor.patch(force_disable_caches=True, compile_threads=1, deterministic=mode != "default"):
        compile_block(module, mode)
        try:
            module(*inputs)
        except Exception:  # Enough, in the wrapping of a compiler's errors
            if not codes:
                raise
    return codes[0]


def main(what: str) -> None:
    """Print the code of one of the two."""
    with torch.device("meta"):
        block = create_model("gspn-dit-xl-2", depth=3).blocks[0].to(torch.bfloat16).requires_grad_(False)
    pretend()
    with FakeTensorMode(allow_non_fake_inputs=True):
        block = block.to_empty(device="cuda")
        x, modulation, condition = (
            torch.empty(64, *shape, dtype=torch.bfloat16, device="cuda")
            for shape in ((16, 16, 1152), (1, 1, 6, 1152), (1, 1, 288))
        )
        if what == "block":
            print(generate(block, "default", x, modulation, condition, 32))
        else:
            print(generate(block.mlp, "max-autotune", x))


if __name__ == "__main__":
    for each in sys.argv[1:]:
        if os.fork() == 0:  # in a process of its own; to import what is needed takes as long as the rest
            print("###", each)
            main(each)
            sys.exit()
        os.wait()
