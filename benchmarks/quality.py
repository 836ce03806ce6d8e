"""Quality at the same budget: families and mixers, trained alike on digits, photographs and a task that needs reach.

`python -m benchmarks.quality --preset gpu --out FOLDER` trains every model on every data set with every seed: the same
width, depth, samples in the same order with the same noise and times, steps, optimiser and EMA. It writes

    settings.json                     what it was begun with
    <data>/<model>/seed-<k>/          result.json and samples.png once finished, checkpoint.pt before
    report.md, losses.png, samples-<data>.png      of what is finished

and is safe to stop at any moment: run it again and it goes on, on the CPU to the same figures bit for bit. With
`--time-budget 500` it stops by itself. A model is a family, or a family and its options, as in
`gspn-dit+mixer=linear` or `gspn-dit+chunk=8+global_layers=4`: an ablation is a longer list of models.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.machine import machine
from benchmarks.quality_data import TASKS, Labelled, Task
from benchmarks.quality_report import write_report
from benchmarks.variants import OF_ANY_FAMILY, VARIANTS
from gspn_dit.conditioning import ClassLabels
from gspn_dit.devices import choose_device
from gspn_dit.diffusion import Batch, create_objective, create_scheduler, denoise, image_generator
from gspn_dit.errors import InputError
from gspn_dit.models import create_model
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.models.macs import count_macs
from gspn_dit.ops.registry import require_kernels
from gspn_dit.options import command, require
from gspn_dit.precision import autocast, choose_precision
from gspn_dit.storage.files import begin_or_continue, replacing, write_json
from gspn_dit.storage.pictures import save_grid
from gspn_dit.training.ema import EMA, exponential
from gspn_dit.training.step import make_batch
from gspn_dit.training.stream import StepSampler, TrainingStream

TIMES = [(i + 0.5) / 10 for i in range(10)]  # of the held-out loss
CHECKPOINT_SECONDS = 60
GRID = 16  # samples in a picture
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "width": 128,
        "depth": 6,
        "steps": 600,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "ema_decay": 0.99,
        "held_out": 128,
        "samples": 256,
        "num_workers": 0,
    },
    "gpu": {
        "width": 384,
        "depth": 12,
        "steps": 5000,
        "batch_size": 64,
        "learning_rate": 5e-4,
        "ema_decay": 0.999,
        "held_out": 500,
        "samples": 2000,
        "num_workers": 8,
    },
}


@dataclass
class Options:
    """What to train, and how.

    Args:
        out: The folder of results; run again with the same one to go on.
        preset: Sizes for a CPU (width 128) or a GPU (the S size); the options that are null take theirs from it.
        data: Data sets: `digits`, `photos`, `reach-32`, `reach-64`.
        models: Families, each with options after a plus, if any.
        seeds: How many seeds, 0, 1, …
        time_budget: Seconds after which to stop; the step or the evaluation that is under way is still finished.
        width: Channels of a token, in every model.
        depth: Blocks, in every model; the family `gspn`, which needs an odd number, takes one more than an even one.
        steps: Optimiser steps.
        batch_size: Images a step.
        learning_rate: Peak of AdamW's learning rate, after a warm-up over 5% of the steps; then a cosine down to 0.
        ema_decay: Decay of the averaged weights, which are what is evaluated.
        mixed_precision: `auto` is bf16 where the device has instructions for it and `no`, float32, elsewhere.
        held_out: Held-out images, each at ten times, of the held-out loss.
        samples: Images drawn for the other figures.
        inference_steps: Euler steps of a sample, without guidance.
        num_workers: Processes that read data.
        compile: Run the models through torch.compile.
        device: `auto`, or a torch device.
    """

    out: str = "runs/quality"
    preset: Literal["cpu", "gpu"] = "cpu"
    data: list[str] = field(default_factory=lambda: list(TASKS))
    models: list[str] = field(
        default_factory=lambda: [
            "dit",
            "gspn",
            "gspn-dit",
            "gspn-dit+mixer=attention",
            "gspn-dit+mixer=linear",
            "gspn-dit+mixer=conv",
        ]
    )
    seeds: int = 3
    time_budget: float | None = None
    width: int | None = None
    depth: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    ema_decay: float | None = None
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    held_out: int | None = None
    samples: int | None = None
    inference_steps: int = 50
    num_workers: int | None = None
    compile: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for key, value in PRESETS[self.preset].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        for key in ("seeds", "steps", "batch_size", "held_out", "inference_steps"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.samples >= 2, "samples", self.samples, "2 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "a number in [0, 1)")
        for name in self.data:
            require(name in TASKS, "data", name, f"data sets out of {', '.join(TASKS)}")


class Deadline:
    """When to stop: a number of seconds from now, or never."""

    def __init__(self, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    def passed(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.end


def make_model(spec: str, task: Task, options: Options) -> LatentModel:
    """The model of a `family+key=value` at the width and depth of all. Raises :class:`InputError`."""
    family, *words = spec.split("+")
    heads = max(1, options.width // 64)
    sizes: dict[str, Any] = {"width": options.width, "depth": options.depth}
    match family:
        case "dit":
            sizes["num_heads"] = heads
        case "gspn":  # an odd number of blocks; without the noise of dropped ones, which no other family has
            sizes |= {"depth": options.depth + 1 - options.depth % 2, "stochastic_depth": 0.0}
        case "gspn-dit":
            sizes["num_groups"] = max(1, options.width // 64)
        case _:
            raise InputError(f"models={spec!r}: wanted dit, gspn or gspn-dit, then options as in +mixer=linear")
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"models={spec!r}: wanted option=value after the plus, not {word!r}")
        sizes[key] = yaml.safe_load(value)
    variants = [variant for variant in sizes.pop("variant", "").split("&") if variant]
    for variant in variants:
        known = VARIANTS if family == "gspn-dit" else OF_ANY_FAMILY
        require(variant in known, "models", spec, f"variants out of {', '.join(known)}")
    channels, *sample_size = task.latent_shape
    model = create_model(
        f"{family}-s-{task.patch_size}",
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        num_classes=task.num_classes,
        **sizes,
    )
    for variant in variants:
        VARIANTS[variant](model)
    return model


class Cell:
    """One model trained with one seed on one data set, from wherever it was left.

    Args:
        folder: Where its checkpoint and its result are.
        options: The benchmark's.
    """

    def __init__(self, folder: Path, task: Task, spec: str, seed: int, options: Options, device: torch.device) -> None:
        self.folder, self.task, self.spec, self.seed = folder, task, spec, seed
        self.options, self.device = options, device
        self.objective, self.conditioning = create_objective("flow"), ClassLabels(task.num_classes)
        self.precision = autocast(device, choose_precision(options.mixed_precision, device).name)
        torch.manual_seed(seed)
        self.model = make_model(spec, task, options).to(device)
        self.average = EMA(self.model, exponential(options.ema_decay))
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=options.learning_rate, weight_decay=0.0
        )
        self.machine = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
        self.step, self.seconds, self.losses = 0, 0.0, []
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            self._load()

    def train(self, deadline: Deadline) -> None:
        """Train to the last step, or to the first that ends after the deadline."""
        begun = saved = time.monotonic()
        before = self.seconds
        self.model.train()
        if self.options.compile:
            torch.compiler.reset()  # after eight models of one class it would compile no more
            self.model.compile(dynamic=False)
        # losses stay on the device until they are saved: reading one would wait for the step
        for batch in self._batches():
            self.losses.append(self._train_step(batch))
            self.step += 1
            now = time.monotonic()
            over = deadline.passed() or self.step == self.options.steps
            if over or now > saved + CHECKPOINT_SECONDS:
                self.losses = [float(loss) for loss in self.losses]
                self.seconds = before + time.monotonic() - begun
                self._save()
                saved = time.monotonic()
                begun += saved - now  # writing is not training
            if over:
                break

    def evaluate(self) -> None:
        """Write the averaged model's figures, result.json, and a grid of samples."""
        self.averaged = copy.deepcopy(self.model).eval()
        self.averaged.load_state_dict(self.average.tensors)
        samples, labels = self._draw()
        save_grid(self.task.images(samples[:GRID]), self.folder / "samples.png")
        with torch.device("meta"):
            counted = make_model(self.spec, self.task, self.options)
        result = {
            "model": self.spec,
            "seed": self.seed,
            "steps": self.step,
            "parameters": counted.num_parameters(),
            "gmacs": count_macs(counted, self.task.latent_shape[1:]) / 1e9,
            "training_seconds": self.seconds,
            "machine": self.machine,
            "held_out_loss": self._held_out_loss(),
            "figures": self.task.judge(samples, labels) | self._judge_network(),
            "losses": self.losses,
        }
        write_json(self.folder / "result.json", result)
        self.checkpoint.unlink(missing_ok=True)

    def _batches(self) -> Iterator[dict[str, Any]]:
        task, options = self.task, self.options
        stream = TrainingStream(
            Labelled(task.train),
            latent_shape=task.latent_shape,
            condition_names=self.conditioning.names,
            dropout=0.1,
            horizontal_flip=task.horizontal_flip,
            seed=self.seed,
        )
        steps = StepSampler(
            self.step, options.steps, batch_size=options.batch_size, accumulation=1, rank=0, processes=1
        )
        return iter(
            DataLoader(
                stream,
                batch_sampler=steps,
                num_workers=options.num_workers,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),
            )
        )

    def _train_step(self, samples: dict[str, Any]) -> Tensor:
        step, last = self.step + 1, self.options.steps
        torch.manual_seed(self.seed * 1_000_003 + step)  # for what a model draws itself, wherever the run was cut
        warmup = max(1, last // 20)
        rate = min(step / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, last - warmup))))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * rate
        samples = send_to_device(samples, self.device, non_blocking=True)
        batch = make_batch(samples, self._encode, self.conditioning)
        with self.precision:
            loss = self.objective.loss(self.model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model, step)
        return loss.detach()

    def _encode(self, samples: dict[str, Any]) -> Tensor:
        return self.task.clean(samples["image"], samples["posterior_noise"])

    @torch.no_grad()
    def _held_out_loss(self) -> list[float]:
        """Mean loss at each of :data:`TIMES` over held-out images, whose noise is the same for every model and time."""
        count, size = min(self.options.held_out, len(self.task.held_out)), self.options.batch_size
        stride = len(self.task.held_out) / count  # spread over them all, for they may be sorted by class
        totals = torch.zeros(len(TIMES), dtype=torch.float64)
        for start in range(0, count, size):
            chosen = [self.task.held_out[int(i * stride)] for i in range(start, min(start + size, count))]
            values, labels = (torch.stack([v for v, _ in chosen]), torch.tensor([label for _, label in chosen]))
            draw = torch.Generator().manual_seed(start)
            posterior_noise, noise = torch.randn(2, len(chosen), *self.task.latent_shape, generator=draw)
            latents = self.task.clean(values, posterior_noise).to(self.device)
            labels, noise = labels.to(self.device), noise.to(self.device)
            for i, t in enumerate(TIMES):
                u = torch.full((len(chosen),), t, device=self.device)  # the times are uniform: u is the time itself
                batch = Batch(latents=latents, noise=noise, u=u, condition={"class_labels": labels})
                with self.precision:
                    losses = self.objective.loss(self.averaged, batch)
                totals[i] += losses.double().sum().cpu()
        return (totals / count).tolist()

    @torch.no_grad()
    def _judge_network(self) -> dict[str, float]:
        def velocity(noisy: Tensor, t: float, labels: Tensor) -> Tensor:
            batches = zip(noisy.split(self.options.batch_size), labels.split(self.options.batch_size), strict=True)
            with self.precision:
                return torch.cat(
                    [
                        self.averaged(
                            some.to(self.device),
                            torch.full((len(some),), 1000 * t, device=self.device),
                            classes.to(self.device),
                        )
                        .float()
                        .cpu()
                        for some, classes in batches
                    ]
                )

        return self.task.judge_network(velocity, self.options.held_out)

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Samples (N, C, h, w) on the CPU, their classes in turn; noise i is a function of i for every model."""
        count, size = self.options.samples, 4 * self.options.batch_size
        labels, drawn = torch.arange(count) % self.task.num_classes, []
        for start in range(0, count, size):
            some = labels[start : start + size]
            noise = torch.stack(
                [torch.randn(self.task.latent_shape, generator=image_generator(0, start + i)) for i in range(len(some))]
            )
            with self.precision:
                latents = denoise(
                    self.averaged,
                    create_scheduler("flow"),
                    noise.to(self.device),
                    {"class_labels": some.to(self.device)},
                    num_inference_steps=self.options.inference_steps,
                )
            drawn.append(latents.cpu())
        return torch.cat(drawn), labels

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "average": self.average.tensors,
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(self.checkpoint) as temporary:
            torch.save(state, temporary)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)  # AdamW counts its steps there
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.model.load_state_dict(state["model"])
        self.average.tensors = {name: tensor.to(self.device) for name, tensor in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])


def settings(options: Options) -> dict[str, Any]:
    """What the figures of one folder have in common; data sets, models and seeds may be added to it."""
    keys = (
        "width",
        "depth",
        "steps",
        "batch_size",
        "learning_rate",
        "ema_decay",
        "mixed_precision",
        "held_out",
        "samples",
        "inference_steps",
        "compile",
    )
    return {key: getattr(options, key) for key in keys}


def main(options: Options) -> None:
    """Train every model on every data set with every seed, as far as the time goes, and report what is finished."""
    deadline = Deadline(options.time_budget)
    device = choose_device(options.device)
    options = replace(options, mixed_precision=choose_precision(options.mixed_precision, device).name)
    require_kernels(device)  # raises where the reference operator would be timed for want of it
    tasks = {name: TASKS[name]() for name in options.data}
    for task in tasks.values():
        for spec in options.models:
            with torch.device("meta"):
                make_model(spec, task, options)  # refuse what cannot be before anything is trained
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    begin_or_continue(out / "settings.json", settings(options), "out")
    stopped = False
    for seed, data, spec in cells(options):
        folder = out / data / spec / f"seed-{seed}"
        if (folder / "result.json").exists():
            continue
        stopped = not run_cell(Cell(folder, tasks[data], spec, seed, options, device), deadline)
        if stopped:
            break
    print(write_report(out, tasks, options.models, TIMES, settings(options)))
    print(
        "time is up: run the same again to go on" if stopped else "all is done",
        f"; report: {out / 'report.md'}",
        sep="",
    )


def cells(options: Options) -> list[tuple[int, str, str]]:
    """(seed, data, model) of everything: one seed of all of it before a second of any."""
    return [(seed, data, spec) for seed in range(options.seeds) for data in options.data for spec in options.models]


def run_cell(cell: Cell, deadline: Deadline) -> bool:
    """Train and evaluate a cell; return whether it was finished and there is time for another.

    However short the time, at least one step is taken, or the evaluation that is all there is left to do.
    """
    if cell.step < cell.options.steps:
        cell.train(deadline)
        print(f"{cell.folder}: step {cell.step} of {cell.options.steps}, {cell.seconds:.0f} s", flush=True)
        if deadline.passed():
            return False
    cell.evaluate()
    return not deadline.passed()


if __name__ == "__main__":
    command(main, Options, prog="python -m benchmarks.quality")
