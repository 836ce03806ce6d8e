"""One optimiser step: micro-batches to gradients, one exchange between processes, the weights and their averages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from gspn_dit.autoencoder import encode_moments, sample_posterior
from gspn_dit.autoencoder.vae import LatentScaling
from gspn_dit.config import Config
from gspn_dit.training.checkpoints import TrainingState, last_good
from gspn_dit.training.parts import Parts
from gspn_dit.training.sharding import whole
from gspn_dit.training.stop_request import StopRequest


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is not a number; the message names the step and the last good checkpoint."""


@dataclass
class Training:
    """A run while it trains.

    Args:
        config: Its options.
        accelerator: What its processes share.
        parts: What it is made of.
        model: Its network, as accelerate wraps it.
        state: What its steps change.
        stop: Whether this process is asked to stop.
    """

    config: Config
    accelerator: Accelerator
    parts: Parts
    model: nn.Module
    state: TrainingState
    stop: StopRequest


def take_step(
    training: Training, batches: Iterator[dict[str, Tensor]], step: int, may_skip: bool
) -> tuple[float, float, bool]:
    """One optimiser step: its loss, the gradient's norm before clipping, and whether any process is asked to stop.

    Args:
        batches: Of :func:`load_batches`; as many are taken as a step accumulates.
        may_skip: Whether a gradient that is not finite only leaves the step out, as fp16's loss scaling does.

    Raises:
        NonFiniteLoss: On every process, before the weights, the optimiser or the averages have changed.
    """
    config, accelerator, parts, model = training.config, training.accelerator, training.parts, training.model
    state, options = training.state, config.training
    torch.manual_seed(step_seed(config.seed, step, accelerator.process_index))  # for what a model draws itself
    losses, finite = [], True
    for micro in range(options.gradient_accumulation_steps):
        batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in next(batches).items()}
        latents = clean_latents(batch, parts.vae, parts.scaling)
        last = micro + 1 == options.gradient_accumulation_steps
        with nullcontext() if last else accelerator.no_sync(model):  # gradients meet once a step
            with accelerator.autocast():
                times = parts.objective.times(batch["u"])
                loss = parts.objective.loss(model, latents, batch["class_label"], times, batch["noise"]).mean()
            accelerator.backward(loss / options.gradient_accumulation_steps)
        losses.append(loss.detach())
        finite = latents.isfinite().all() & finite
    # One exchange a step: the loss, whether its data were numbers, and whether any process is asked to stop.
    stop_requested = loss.new_full((), training.stop.requested)
    told = accelerator.reduce(torch.stack([torch.stack(losses).mean(), finite.float(), stop_requested]), "mean")
    # Whole: with FSDP2, torch 2.8 returns each process's part of the norm. Only tolist() waits for the device.
    grad_norm = whole(accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm or math.inf))
    loss, finite, stopping, grad_norm = torch.cat([told, grad_norm.reshape(1)]).tolist()
    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or may_skip):
        raise NonFiniteLoss(_non_finite(loss, grad_norm, finite == 1, step, config))
    state.optimizer.step()
    state.optimizer.zero_grad()
    for average in (state.ema, *state.power_emas.values()):
        average.update(state.model, step)
    return loss, grad_norm, stopping > 0


def step_seed(seed: int, step: int, process: int) -> int:
    """The seed of what a model draws itself (stochastic depth) in one step of one process."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0])


def clean_latents(batch: dict[str, Tensor], vae: AutoencoderKL | None, scaling: LatentScaling) -> Tensor:
    """Normalised latents (B, C, h, w) of a batch of moments or of images."""
    moments = batch["moments"] if "moments" in batch else encode_moments(vae, batch["image"])
    return sample_posterior(scaling, moments, batch["posterior_noise"])


def _non_finite(loss: float, grad_norm: float, finite: bool, step: int, config: Config) -> str:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
    remedy = "A lower training.learning_rate or clipping may help"
    if not finite:
        what += f", as are latents of its batch from data.source={config.data.source!r},"
        remedy = "Check the data: for a store, `python -m gspn_dit.data.encode --verify STORE`"
    return f"{what} at step {step}, which was not taken; {last_good(config.output_dir)}. {remedy}"
