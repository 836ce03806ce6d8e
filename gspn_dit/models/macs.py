"""Multiply-accumulates of one forward pass of a model (`model.num_parameters()` counts its parameters)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gspn_dit.models.classifier import GSPNClassifier
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.models.text_to_image import TextToImageModel


def count_macs(
    model: LatentModel | GSPNClassifier | TextToImageModel,
    size: tuple[int, int],
    condition: Mapping[str, Tensor] | None = None,
) -> int:
    """Multiply-accumulates of one forward pass of one sample, the unit that DiT's and Swin's papers call FLOPs.

    Counted are matrix products, convolutions and the scans of :func:`gspn_dit.ops.propagate`; norms, activations and
    other elementwise work are not, as is usual. The model should be on the meta device: nothing need be computed.

    Args:
        model: One of this package's.
        size: Height and width of the latents, divisible by the model's patch, or of a classifier's image.
        condition: What a sample of latents is to be, (1, …) on the model's device, by the names of the model's
            arguments; None takes the model's `example_condition`.
    """
    inputs = model.example_inputs(size) if condition is None else model.example_inputs(size, condition)
    return macs_of(lambda: model(**inputs))


def macs_of(call: Callable[[], object]) -> int:
    """Multiply-accumulates of a call of any model, of all samples in it, counted as :func:`count_macs` does."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.gspn_dit.propagate: _propagate_flops})
    with counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2


def _propagate_flops(
    x_shape: Sequence[int],
    gates_shape: Sequence[int],
    input_gate_shape: Sequence[int],
    *factor_shapes_and_options: Sequence[int] | None,
    **_: object,
) -> int:
    """Two per multiplication, of which every channel and direction has one per neighbour and per factor.

    There are three neighbours; the factors are the input gate, and output gate, decay and scale where they are given.
    """
    batch, height, width, channels = x_shape
    directions = input_gate_shape[3]
    factors = sum(shape is not None for shape in factor_shapes_and_options[:3])
    return 2 * batch * height * width * channels * directions * (4 + factors)
