"""One optimiser step: micro-batches to gradients, one exchange between processes, the weights and their averages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from gspn_dit.data.workers import Ahead
from gspn_dit.training.checkpoints import State, last_good
from gspn_dit.training.sharding import full_tensor
from gspn_dit.training.stop_request import StopRequest
from gspn_dit.training.task import Task


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is not a number; the message names the step and the last good checkpoint."""


def take_step(
    task: Task, state: State, batches: Ahead[Any], step: int, stop: StopRequest, may_skip: bool
) -> tuple[float, float, bool]:
    """One optimiser step: its loss, the gradient's norm before clipping, and whether any process is asked to stop.

    Args:
        task: What is trained, and how.
        state: What the step changes.
        batches: This process's micro-batches of the stream; as many are taken as a step accumulates, and the next is
            fetched while the device computes.
        step: Its number: 1, 2, …
        stop: Whether this process is asked to stop.
        may_skip: Whether a gradient that is not finite only leaves the step out, as fp16's loss scaling does.

    Raises:
        NonFiniteLoss: On every process, before the weights, the optimiser or the averages have changed.
    """
    accelerator, model, options = task.accelerator, state.wrapped, task.options
    passes, seed = options.gradient_accumulation_steps, step_seed(task.config.seed, step, accelerator.process_index)
    torch.manual_seed(seed)  # for what a model draws itself

    def find_gradients(batch: Mapping[str, Any]) -> Tensor:
        with accelerator.autocast():
            loss = task.loss(model, batch).mean()
        accelerator.backward(loss / passes)
        return loss.detach()

    losses, finite = [], []
    for micro in range(passes):
        samples = send_to_device(next(batches), accelerator.device, non_blocking=True)
        batch = task.batch(samples, step)
        finite.append(task.is_finite(batch))
        if state.graph is not None:
            losses.append(state.graph.gradients(batch, find_gradients, seed))
            continue
        last = micro + 1 == passes
        with nullcontext() if last else accelerator.no_sync(model):  # gradients meet once a step
            losses.append(find_gradients(batch))
    # One exchange a step: the loss, whether its data were numbers, and whether any process is asked to stop.
    stop_requested = losses[0].new_full((), stop.requested)
    mean, is_finite = torch.stack(losses).mean(), torch.stack(finite).all().to(losses[0].dtype)
    told = accelerator.reduce(torch.stack([mean, is_finite, stop_requested]), "mean")
    grad_norm = clip_gradients(accelerator, model.parameters(), options.max_grad_norm)
    batches.fetch()  # before the one wait for the device, which is tolist()
    loss, finite, stopping, grad_norm = torch.cat([told, grad_norm.reshape(1)]).tolist()
    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or may_skip):
        raise NonFiniteLoss(_non_finite(loss, grad_norm, finite == 1, step, task))
    state.optimizer.step()
    if state.graph is None:
        state.optimizer.zero_grad()
    for average in (state.ema, *state.power_emas.values()):
        average.update(state.model, step)
    return loss, grad_norm, stopping > 0


def clip_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """The norm of all gradients together, which are scaled down to `most` where it is more; 0 leaves them as they are.

    It is whole: with FSDP2, torch 2.8 returns each process's part.
    """
    if most:
        return full_tensor(accelerator.clip_grad_norm_(parameters, most))
    accelerator.unscale_gradients()
    return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def step_seed(seed: int, step: int, process: int) -> int:
    """The seed of what a model draws itself (stochastic depth) in one step of one process."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0])


def _non_finite(loss: float, grad_norm: float, finite: bool, step: int, task: Task) -> str:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
    remedy = "A lower training.learning_rate or clipping may help"
    if not finite:
        data, remedy = task.blame_data()
        what += f", as are {data},"
    return f"{what} at step {step}, which was not taken; {last_good(task.config.output_dir)}. {remedy}"
