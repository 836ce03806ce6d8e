"""`gspn-dit budget`: what a training will need, computed from counted parameters and operations.

Nothing here is measured. The tables of docs/cluster.md are this command's output.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("budget", prog="python -m gspn_dit.training.budget")
    raise SystemExit

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from gspn_dit.errors import renamed
from gspn_dit.models import create_classifier, create_model, list_classifiers
from gspn_dit.models.classifier import GSPNClassifier
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.models.macs import count_macs
from gspn_dit.models.registry import find_preset

if TYPE_CHECKING:
    from gspn_dit.commands import BudgetOptions as Options

Model = LatentModel | GSPNClassifier

# Bytes a parameter: float32 weights, their gradients, AdamW's two moments, the averaged weights.
STATE_BYTES = 4 + 4 + 8 + 4
AUTOCAST_BYTES = 2  # autocast keeps a bfloat16 copy of the weights through a step
USABLE = 0.9  # of a GPU's memory: the rest is CUDA's, NCCL's and fragments


@dataclass
class Cost:
    """A model's cost at one size: parameters, multiply-accumulates of a forward, and bytes kept for the backward pass.

    Args:
        parameters: How many.
        macs: Of one image.
        activations: Bytes an image in bfloat16 autocast.
        checkpointed: The same with gradient checkpointing: the blocks' inputs, and one block at a time.
    """

    parameters: int
    macs: int
    activations: float
    checkpointed: float


def count_cost(name: str, image_size: int) -> Cost:
    """Count a model of latents, an eighth of the images' side, or a classifier of images; nothing is computed."""
    build: Callable[[], Model]
    if name in list_classifiers():
        side, build = image_size, partial(create_classifier, name)
    else:
        side = image_size // 8
        build = partial(create_model, name, sample_size=side)
    with torch.device("meta"):
        model = build()
    blocks = sum(spec.depth for spec in model.specs) if isinstance(model, GSPNClassifier) else len(model.blocks)
    kept = activation_bytes(build, side)
    inputs = activation_bytes(lambda: _checkpointing(build()), side)
    return Cost(model.num_parameters(), count_macs(model, (side, side)), kept, inputs + kept / blocks)


def activation_bytes(build: Callable[[], Model], side: int) -> float:
    """Bytes that one more image, or its latents, makes the backward pass keep, by the CPU's autocast rules.

    A GPU's are nearly the same; `gspn`'s norms are in float32 there.
    """
    with torch.device("meta"):
        model = build()
    with FakeTensorMode(allow_non_fake_inputs=True):  # which cannot draw a truncated normal distribution
        model = model.to_empty(device="cpu")
        one, two = (_saved_bytes(model, batch, side) for batch in (1, 2))
    return two - one


def main(options: Options) -> None:
    """Print what training needs: memory of a GPU, steps per second to expect, hours; computed, not measured."""
    with renamed(name="names"):
        for name in options.names:
            if name not in list_classifiers():
                find_preset(name)
    costs = {name: count_cost(name, options.image_size) for name in options.names}
    print(
        f"Computed, not measured: {options.image_size} pixels per side, {options.batch_size} images per step, "
        f"GPUs of {options.memory_gb:g} GB,\n{options.utilisation:.0%} of {options.peak_tflops:g} TFLOP/s reached; "
        f"{options.node_gpus} GPUs per machine, each sending {options.node_gb_s:g} GB/s in it and "
        f"{options.network_gb_s:g} GB/s out of it.\n"
    )
    print(
        "| model | parameters | GMACs per image | state GB | over 8 GPUs (FSDP) | over 64 | "
        "GB per image | with checkpointing |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, cost in costs.items():
        state = cost.parameters * STATE_BYTES / 1e9
        print(
            f"| {name} | {cost.parameters / 1e6:.1f} M | {cost.macs / 1e9:.1f} | {state:.1f} | {state / 8:.2f} | "
            f"{state / 64:.2f} | {cost.activations / 1e9:.2f} | {cost.checkpointed / 1e9:.3f} |"
        )
    print(
        f"\n| model | GPUs | images per pass × accumulation | GB per GPU | steps/s | bound by | hours to "
        f"{options.steps:,} steps |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, cost in costs.items():
        for gpus in options.gpus:
            print(plan(name, cost, gpus, options))


def plan(name: str, cost: Cost, gpus: int, options: Options) -> str:
    """A line of the second table: the largest pass that fits, without checkpointing if that fits at all."""
    each = options.batch_size // gpus
    fixed = cost.parameters * (STATE_BYTES + AUTOCAST_BYTES)
    room = options.memory_gb * 1e9 * USABLE - fixed
    passes = [n for n in range(1, each + 1) if each % n == 0]
    checkpointing = room < cost.activations
    image = cost.checkpointed if checkpointing else cost.activations
    fitting = [n for n in passes if n * image <= room]
    if not fitting:
        return f"| {name} | {gpus} | FSDP: the state alone does not fit | {fixed / 1e9:.1f} | – | – | – |"
    images = fitting[-1]
    # A backward pass is two forward passes; checkpointing adds a third. A multiply-accumulate is two operations.
    operations = 2 * cost.macs * options.batch_size * (4 if checkpointing else 3)
    computing = operations / (gpus * options.peak_tflops * 1e12 * options.utilisation)
    # Every GPU sends and receives each float32 gradient twice, less its own share, while the backward pass runs.
    link = options.node_gb_s if gpus <= options.node_gpus else options.network_gb_s
    exchanging = 2 * (gpus - 1) / gpus * 4 * cost.parameters / (link * 1e9)
    speed, bound = 1 / max(computing, exchanging), "exchange" if exchanging > computing else "compute"
    return (
        f"| {name} | {gpus} | {images} × {each // images}{' with checkpointing' if checkpointing else ''} | "
        f"{(fixed + images * image) / 1e9:.1f} | {speed:.2f} | {bound} | {options.steps / speed / 3600:.1f} |"
    )


def _checkpointing(model: Model) -> Model:
    model.enable_gradient_checkpointing()
    return model


def _saved_bytes(model: Model, batch: int, side: int) -> int:
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    one = model.example_inputs((side, side))
    inputs = {name: tensor.repeat(batch, *[1] * (tensor.ndim - 1)) for name, tensor in one.items()}
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    return sum(storage.nbytes() for storage in kept.values())
