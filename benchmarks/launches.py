"""What a step of the digits recipe launches, as usual and as a CUDA graph; on a GPU also steps a second.

`python -m benchmarks.launches [--device cuda] [--out FILE.md]` counts every operation that a training step and a
guided denoising step hand to the device; views, and what allocates, are none. An operation on a list of tensors counts
once, and so does a replay. On the CPU a graph is stood in for: the counts are those of a GPU, but for the checks of
labels, which only a CPU makes.
"""

from __future__ import annotations

from benchmarks.commands import LaunchesOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("launches"))

import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import machine
from benchmarks.result_files import write_report
from benchmarks.tables import header, row
from gspn_dit.conditioning import ClassLabels
from gspn_dit.config import Config
from gspn_dit.cuda_graphs import CudaRecorder, Recorder
from gspn_dit.data.workers import Ahead
from gspn_dit.diffusion import create_objective, create_scheduler, denoise
from gspn_dit.inference.graphed_model import GraphedModel
from gspn_dit.models import create_model
from gspn_dit.precision import autocast
from gspn_dit.training.checkpoints import State
from gspn_dit.training.diffusion import DiffusionTask
from gspn_dit.training.ema import EMA, exponential
from gspn_dit.training.latents import FromMoments
from gspn_dit.training.step import take_step
from gspn_dit.training.step_graph import StepGraph
from gspn_dit.training.stop_request import StopRequest

RECIPE = Path(__file__).parents[1] / "configs" / "digits.yaml"
LATENTS, CLASSES = (4, 4, 4), 10  # of the digits' VAE
IMAGES = 16  # a batch of `gspn-dit sample`
WARM, TIMED = 20, 200  # steps


class Launches(TorchDispatchMode):
    """Counts what is handed to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        free = ("empty", "_unsafe_view", "detach", "lift_fresh", "promote_types", "_local_scalar_dense", "profiler")
        if not func.is_view and not any(name in func.name() for name in free):
            self.count += 1
        return func(*args, **(kwargs or {}))


class StandIn:
    """A recorder that replays nothing, by one launch: what was recorded is not done again."""

    def rehearse(self, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        one = torch.empty(())

        def replay() -> None:
            one.zero_()

        return work(), replay


def recorder(device: torch.device) -> Recorder:
    """Of a GPU, or what stands in for one."""
    return CudaRecorder(device) if device.type == "cuda" else StandIn()


def training_step(options: Options, graphed: bool) -> Callable[[], object]:
    """Steps of the recipe on made latents, one a call."""
    config = Config.load(RECIPE)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=options.precision)
    objective = create_objective(config.diffusion.objective, time_sampling=config.diffusion.time_sampling)
    model = new_model(config, objective.out_channels(LATENTS[0])).to(accelerator.device)
    size, generator = config.training.batch_size, torch.Generator().manual_seed(0)
    noise = partial(torch.randn, size, *LATENTS, generator=generator)
    samples = {
        "moments": torch.cat([noise(), noise()], 1),
        "posterior_noise": noise(),
        "noise": noise(),
        "u": torch.rand(size, generator=generator),
        "condition": {"class_labels": torch.arange(size) % CLASSES},
        "drop": torch.rand(size, generator=generator) < config.diffusion.class_dropout,
    }
    optimizer = torch.optim.AdamW(model.parameters(), config.training.learning_rate, fused=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    graph = StepGraph(recorder(accelerator.device), list(model.parameters())) if graphed else None
    state = State(model, wrapped, optimizer, EMA(model, exponential(config.training.ema_decay)), {}, "", graph)
    encoder = FromMoments(SimpleNamespace(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None))
    parts = (None, None, encoder, ClassLabels(CLASSES), objective, lambda: model, None, {}, None)
    task = DiffusionTask(config, accelerator, *parts)
    batches, stop, step = Ahead(repeat(samples)), StopRequest(), iter(range(1, 10**9))
    return lambda: take_step(task, state, batches, next(step), stop, may_skip=False)


def denoising(options: Options, graphed: bool, steps: int) -> Callable[[], Tensor]:
    """A batch of the recipe's model from noise, guided, in that many steps."""
    config, device = Config.load(RECIPE), torch.device(options.device)
    model = new_model(config, LATENTS[0]).to(device).eval()
    called = GraphedModel(model, True, recorder(device)) if graphed else model
    labels = torch.arange(IMAGES, device=device) % CLASSES
    noise = torch.randn(IMAGES, *LATENTS, generator=torch.Generator().manual_seed(0)).to(device)
    scheduler = create_scheduler(config.diffusion.objective)

    def draw() -> Tensor:
        with autocast(device, options.precision):
            return denoise(
                called,
                scheduler,
                noise,
                {"class_labels": labels},
                null_condition={"class_labels": torch.full_like(labels, CLASSES)},
                guidance_scale=config.sampling.guidance_scale,
                num_inference_steps=steps,
            )

    return draw


def new_model(config: Config, out_channels: int) -> torch.nn.Module:
    """The recipe's network."""
    overrides = config.model.overrides
    return create_model(
        config.model.name, sample_size=LATENTS[1:], out_channels=out_channels, num_classes=CLASSES, **overrides
    )


def launches_of(call: Callable[[], object]) -> int:
    """What a call launches, once it has been called before."""
    call()
    with Launches() as launches:
        call()
    return launches.count


def per_second(call: Callable[[], object]) -> str:
    """Calls a second on a GPU; a dash elsewhere."""
    if not torch.cuda.is_available():
        return "–"
    for _ in range(WARM):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(TIMED):
        call()
    torch.cuda.synchronize()
    return f"{TIMED / (time.perf_counter() - start):.1f}"


def main(options: Options) -> None:
    """Count, and on a GPU measure."""
    torch.set_num_threads(options.threads)
    lines = [*header(["digits recipe, a step", "launches", "steps per second"])]
    for name, graphed in (("training, as usual", False), ("training, CUDA graph", True)):
        step = training_step(options, graphed)
        lines.append(row([name, launches_of(step), per_second(step) if options.device == "cuda" else "–"]))
    few, many = 5, 25
    for name, graphed in (("denoising, as usual", False), ("denoising, CUDA graph", True)):
        counts = [launches_of(denoising(options, graphed, steps)) for steps in (few, many)]
        rate = "–"
        if options.device == "cuda":
            one = denoising(options, graphed, many)
            rate = f"{many * float(per_second(one)):.0f}"
        lines.append(row([name, (counts[1] - counts[0]) // (many - few), rate]))
    write_report(lines, machine(options.device), options.out)
