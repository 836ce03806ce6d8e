"""One model of `benchmarks.quality`, trained with one seed on one data set by the project's own steps, and judged."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.commands import QualityOptions
from benchmarks.deadline import Deadline
from benchmarks.machine import machine
from benchmarks.quality_data import Labelled, Task
from benchmarks.quality_model import make_model, model_config
from benchmarks.result_files import noted
from gspn_dit.conditioning import ClassLabels
from gspn_dit.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainingConfig
from gspn_dit.diffusion import Batch, create_objective, create_scheduler, denoise, image_generator
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.models.macs import count_macs
from gspn_dit.precision import autocast
from gspn_dit.storage.files import write_json
from gspn_dit.storage.pictures import save_grid
from gspn_dit.storage.run_folder import RunFolder
from gspn_dit.training.checkpoints import load_checkpoint, save_checkpoint
from gspn_dit.training.diffusion import DiffusionTask
from gspn_dit.training.loop import learning_rate_at, load_batches, prepare
from gspn_dit.training.step import take_step
from gspn_dit.training.stop_request import StopRequest
from gspn_dit.training.stream import TrainingStream

TIMES = [(i + 0.5) / 10 for i in range(10)]  # of the held-out loss
CHECKPOINT_SECONDS = 60
GRID = 16  # samples in a picture


class Cell:
    """One model trained with one seed on one data set, from wherever it was left.

    Args:
        folder: Where its checkpoints and its result are.
        task: The data set.
        spec: The model's word.
        seed: Of its weights and its training stream.
        options: The benchmark's.
        accelerator: The process's.
        stop: Whether the process is asked to stop.
        training: What is otherwise than in :func:`training_config`, of a training's options.

    Attributes:
        step: Steps taken.
        seconds: Wall time that they took, but for the first since the cell was made, which gets things going.
        losses: The training loss of each.
        curve: Step, seconds and mean held-out loss, wherever :meth:`train` was to look at it.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        spec: str,
        seed: int,
        options: QualityOptions,
        accelerator: Accelerator,
        stop: StopRequest,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.task, self.spec, self.seed, self.options = folder, task, spec, seed, options
        self.device, self.stop = accelerator.device, stop
        self.precision = partial(autocast, self.device, options.mixed_precision)
        torch.manual_seed(seed)
        model = make_model(spec, task, options).to(self.device)
        if options.compile:
            torch.compiler.reset()  # after eight models of one class it would compile no more
        accelerator.free_memory()  # of the cell before
        config = training_config(folder, task, spec, seed, options)
        self.run = self._run(replace(config, training=replace(config.training, **(training or {}))), accelerator)
        self.state = prepare(self.run, model, is_new=True)
        self.step, self.seconds, self.losses, self.curve = 0, 0.0, [], []
        if checkpoint := RunFolder(folder).newest_checkpoint():
            done = load_checkpoint(accelerator, checkpoint, self.state)
            self.step, self.seconds, self.losses = done["step"], done["seconds"], done["losses"]
            self.curve = done.get("curve", [])

    def train(self, deadline: Deadline, look_every: int = 0) -> None:
        """Train to the last step, or to the first that ends after the deadline or a request to stop.

        Args:
            deadline: When to stop.
            look_every: Steps between looks at the held-out loss, whose time does not count; 0 for none.

        Raises :class:`gspn_dit.training.step.NonFiniteLoss` at a step whose loss or gradient is not finite.
        """
        options = self.run.config.training
        begun = saved = time.monotonic()
        before, first = self.seconds, True
        batches, stopping = load_batches(self.run, self.step), False
        while self.step < options.max_steps and not stopping:
            self.step += 1
            for group in self.state.optimizer.param_groups:
                group["lr"] = learning_rate_at(self.step, options)
            loss, _, stopping = take_step(self.run, self.state, batches, self.step, self.stop, may_skip=False)
            self.losses.append(loss)
            now = time.monotonic()
            if first:
                begun, first = now, False
            if look_every and self.step % look_every == 0:
                loss_now = statistics.mean(self.held_out_loss(self.averaged()))
                self.curve.append((self.step, before + now - begun, loss_now))
                begun += time.monotonic() - now
                now = time.monotonic()
            stopping = stopping or deadline.passed()
            if stopping or self.step == options.max_steps or now > saved + CHECKPOINT_SECONDS:
                self.seconds = before + now - begun
                self._save()
                saved = time.monotonic()
                begun += saved - now  # writing is not training

    def evaluate(self) -> None:
        """Write the averaged model's figures, result.json, and a grid of samples."""
        averaged = self.averaged()
        samples, labels = self._draw(averaged)
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
            "machine": machine(self.device.type),
            "held_out_loss": self.held_out_loss(averaged),
            "figures": self.task.judge(samples, labels) | self._judge_network(averaged),
            "losses": self.losses,
        }
        write_json(self.folder / "result.json", noted(result))
        shutil.rmtree(RunFolder(self.folder).checkpoints, ignore_errors=True)

    def averaged(self) -> LatentModel:
        """The model of the averaged weights."""
        model = make_model(self.spec, self.task, self.options).to(self.device).eval()
        model.load_state_dict(self.state.ema.tensors)
        return model

    def _run(self, config: Config, accelerator: Accelerator) -> DiffusionTask:
        """What the run is made of: as for `gspn-dit train`, but that the task makes the latents."""
        task, conditioning = self.task, ClassLabels(self.task.num_classes)
        source = Labelled(task.train, task.num_classes)
        stream = TrainingStream(
            source,
            latent_shape=task.latent_shape,
            condition_names=conditioning.names,
            dropout=config.diffusion.class_dropout,
            horizontal_flip=task.horizontal_flip,
            seed=self.seed,
        )
        return DiffusionTask(
            config=config,
            accelerator=accelerator,
            source=source,
            stream=stream,
            encoder=self._encode,
            conditioning=conditioning,
            objective=create_objective("flow"),
            build=partial(make_model, self.spec, task, self.options),
            vae=None,
            vae_record={},
            evaluator=None,
        )

    def _encode(self, samples: dict[str, Any]) -> Tensor:
        """Clean latents of samples of the stream."""
        return self.task.clean(samples["image"], samples["posterior_noise"])

    @torch.no_grad()
    def held_out_loss(self, model: LatentModel) -> list[float]:
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
                with self.precision():
                    losses = self.run.objective.loss(model, batch)
                totals[i] += losses.double().sum().cpu()
        return (totals / count).tolist()

    @torch.no_grad()
    def _judge_network(self, model: LatentModel) -> dict[str, float]:
        def velocity(noisy: Tensor, t: float, labels: Tensor) -> Tensor:
            found, size = [], self.options.batch_size
            for some, classes in zip(noisy.split(size), labels.split(size), strict=True):
                timesteps = torch.full((len(some),), 1000 * t, device=self.device)
                with self.precision():
                    found.append(model(some.to(self.device), timesteps, classes.to(self.device)).float().cpu())
            return torch.cat(found)

        return self.task.judge_network(velocity, self.options.held_out)

    def _draw(self, model: LatentModel) -> tuple[Tensor, Tensor]:
        """Samples (N, C, h, w) on the CPU, their classes in turn; noise i is a function of i for every model."""
        count, size = self.options.samples, 4 * self.options.batch_size
        labels, drawn = torch.arange(count) % self.task.num_classes, []
        for start in range(0, count, size):
            some = labels[start : start + size]
            noise = torch.stack(
                [torch.randn(self.task.latent_shape, generator=image_generator(0, start + i)) for i in range(len(some))]
            )
            with self.precision():
                latents = denoise(
                    model,
                    create_scheduler("flow"),
                    noise.to(self.device),
                    {"class_labels": some.to(self.device)},
                    num_inference_steps=self.options.inference_steps,
                )
            drawn.append(latents.cpu())
        return torch.cat(drawn), labels

    def _save(self) -> None:
        """A checkpoint of the step, with what is known of the steps before."""
        metadata = {"step": self.step, "seconds": self.seconds, "losses": self.losses, "curve": self.curve}
        run = self.run
        save_checkpoint(run.accelerator, run.config, self.state, run.source.class_names, metadata)


def training_config(folder: Path, task: Task, spec: str, seed: int, options: QualityOptions) -> Config:
    """The cell as a configuration of `gspn-dit train`: AdamW, a warm-up over 5% of the steps, then a cosine to 0."""
    name, sizes, _ = model_config(spec, task, options)
    return Config(
        output_dir=str(folder),
        seed=seed,
        model=ModelConfig(name, sizes),
        data=DataConfig(task.name, horizontal_flip=task.horizontal_flip, num_workers=options.num_workers),
        diffusion=DiffusionConfig("flow"),
        training=TrainingConfig(
            max_steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_schedule="cosine",
            warmup_steps=max(1, options.steps // 20),
            max_grad_norm=1.0,
            ema_decay=options.ema_decay,
            mixed_precision=options.mixed_precision,
            compile=options.compile,
            keep_checkpoints=1,
            trackers=[],
        ),
    )
