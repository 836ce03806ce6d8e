"""A model's blocks, or one of them, through torch.compile, in one of two modes.

Under `default` products are a library's, and what lies between them are passes over the map (`gspn_dit.layers.fused`).
Under `max-autotune` Inductor writes kernels of its own for each product, with the elementwise operations after it in
the same kernel, times them against the library's product and a pass on the device at hand, and keeps the fastest. So
the squared ReLU is no operator there, which nothing can be fused with, but its composition.
"""

from __future__ import annotations

from torch import nn

from gspn_dit.arguments import CompileMode
from gspn_dit.layers.feed_forward import SquaredReLU
from gspn_dit.models.latent_model import LatentModel

TORCH_MODES: dict[CompileMode, str] = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_blocks(model: LatentModel, mode: CompileMode = "default") -> None:
    """Compile every block of a model by itself, for maps of one shape at a time."""
    _leave_to_inductor(model, mode)
    model.compile_repeated_blocks(dynamic=False, mode=TORCH_MODES[mode])


def compile_block(block: nn.Module, mode: CompileMode = "default") -> None:
    """As :func:`compile_blocks`, one block."""
    _leave_to_inductor(block, mode)
    block.compile(dynamic=False, mode=TORCH_MODES[mode])


def _leave_to_inductor(module: nn.Module, mode: CompileMode) -> None:
    for layer in module.modules():
        if isinstance(layer, SquaredReLU):
            layer.fusable = mode == "max-autotune"
