"""The sampling loop: noise to latents with classifier-free guidance, through any of diffusers' schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor

from gspn_dit.arguments import check_guidance, check_num_inference_steps
from gspn_dit.diffusion.schedulers import SAMPLERS, objective_of
from gspn_dit.errors import InputError

Generators = torch.Generator | list[torch.Generator] | None


def image_generator(seed: int, i: int) -> torch.Generator:
    """The CPU generator of every random number of image i: a function of (seed, i) alone.

    Raises :class:`InputError` for a negative seed.
    """
    if seed < 0:
        raise InputError(argument="seed", value=seed, wanted="0 or more")
    # A torch CPU generator keeps 32 bits of its seed. Counting up from a hashed start uses all of them once, whereas
    # hashing (seed, i) would give the same noise to some pair among a hundred thousand images.
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed((start + i) % 2**32)


@torch.no_grad()
def denoise(
    model: Callable[..., Tensor],
    scheduler: SchedulerMixin,
    noise: Tensor,
    condition: Mapping[str, Tensor],
    *,
    null_condition: Mapping[str, Tensor] | None = None,
    model_options: Mapping[str, Any] | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    num_inference_steps: int = 50,
    generator: Generators = None,
    callback: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Tensor:
    """Integrate standard normal noise (B,C,h,w) to clean latents of the same shape, float32.

    Args:
        model: Called as model(latents, timesteps (B,) on the scale 0…1000, **condition, **model_options) ->
            (B,C,h,w), or (B,2C,h,w) with the learned variance.
        scheduler: Any diffusers scheduler for the model's objective.
        noise: (B,C,h,w), standard normal, on the model's device.
        condition: What the images are to be, tensors (B, …) by the names of the model's arguments, on its device.
        null_condition: The condition that says nothing, of the same names and shapes. Only guidance needs it.
        model_options: Further arguments of the model, the same at every step.
        guidance_scale: w of ε = ε(∅) + w·(ε(c) - ε(∅)) on all latent channels (Ho & Salimans, arXiv 2207.12598); the
            learned variance stays the conditional one. 1 is no guidance and costs one forward per step, not two.
        guidance_interval: Share of the noise levels t/1000 at which guidance acts, 0 clean and 1 pure noise
            (Kynkäänniemi et al., arXiv 2404.07724); outside it a step costs one forward.
        num_inference_steps: Steps of the scheduler.
        generator: Of the noise that stochastic samplers add; with a list, image b's comes from the b-th alone.
        callback: Called as callback(step, timestep, latents) after each step; what it returns, if not None, replaces
            the latents.
        progress: Wraps the iterable of timesteps, as `tqdm` does.

    Raises :class:`InputError` for options out of range, a null condition that is missing or does not fit, or a model
    that is not of the scheduler's objective.
    """
    check_guidance(guidance_scale, guidance_interval)
    both = {} if guidance_scale == 1 else _with_null(condition, null_condition, guidance_scale)
    options = model_options or {}
    low, high = guidance_interval
    scheduler = _taking_our_variance(scheduler)
    _set_timesteps(scheduler, num_inference_steps)
    step_options = {"generator": generator} if _accepts(scheduler.step, "generator") else {}
    dtype = getattr(model, "dtype", torch.float32)

    latents = noise.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    levels = (scheduler.timesteps.double() / 1000).clamp(max=1).tolist()  # a shifted one may be rounded up from 1
    told = scheduler.timesteps.float().to(noise.device)
    for step, (timestep, level) in enumerate(zip(progress(scheduler.timesteps), levels, strict=True)):
        inputs = latents
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(latents, timestep)
        inputs, timesteps = inputs.to(dtype), told[step].expand(len(latents))
        guided = guidance_scale != 1 and low <= level <= high
        if guided:
            twice = model(inputs.repeat(2, 1, 1, 1), timesteps.repeat(2), **both, **options)
            output, unconditional = twice.float().chunk(2)
        else:
            output = model(inputs, timesteps, **condition, **options).float()
        _check_objective(scheduler, output, latents)

        prediction, variance = output.split([latents.shape[1], output.shape[1] - latents.shape[1]], dim=1)
        if guided:
            unconditional = unconditional[:, : latents.shape[1]]
            prediction = unconditional + guidance_scale * (prediction - unconditional)
        if _uses_variance(scheduler):
            prediction = torch.cat([prediction, variance], dim=1)
        latents = scheduler.step(prediction, timestep, latents, **step_options).prev_sample
        if callback is not None and (replaced := callback(step, timestep, latents)) is not None:
            latents = replaced
    return latents


def _with_null(
    condition: Mapping[str, Tensor], null_condition: Mapping[str, Tensor] | None, guidance_scale: float
) -> dict[str, Tensor]:
    """The rows of a condition and below them those of the null condition. Raises :class:`InputError`."""
    if null_condition is None:
        raise InputError(
            "null_condition is None",
            argument="guidance_scale",
            value=guidance_scale,
            remedy="give the condition that guidance leads away from, or guidance_scale 1",
        )
    given, null = ({name: tuple(t.shape) for name, t in each.items()} for each in (condition, null_condition))
    if given != null:
        raise InputError(f"shapes {null}", argument="null_condition", wanted=f"those of condition, {given}")
    return {name: torch.cat([tensor, null_condition[name]]) for name, tensor in condition.items()}


def _set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Set the scheduler's steps; for the flow, when it takes noise levels, even ones from 1 down to 1/n.

    They stay on the CPU: samplers look up their tables by them, and compare them, which on a GPU would wait for it.
    """
    check_steps(scheduler, num_inference_steps)
    levels = {}
    if objective_of(scheduler) == "flow" and _accepts(scheduler.set_timesteps, "sigmas"):
        # Left alone, diffusers' last step goes from 0.001 to 0: a forward for nothing.
        levels = {"sigmas": np.linspace(1, 1 / num_inference_steps, num_inference_steps)}
    scheduler.set_timesteps(num_inference_steps, device="cpu", **levels)


def check_steps(scheduler: SchedulerMixin, n: int) -> None:
    """Raise :class:`InputError` for a number of steps at which a diffusers scheduler would quietly be wrong."""
    total = scheduler.config.num_train_timesteps
    least = 2 if isinstance(scheduler, DDPMScheduler) else 1  # its only step would be at t = 0, the clean end
    most = total - 1 if isinstance(scheduler, DPMSolverMultistepScheduler) else total  # its first two would coincide
    check_num_inference_steps(n, least=least, most=most, who=type(scheduler).__name__)
    # DDIM takes whole strides of total // n between times that are total / n apart: what they differ by adds up.
    if isinstance(scheduler, DDIMScheduler) and total % n > 0.01 * total:
        near = min((m for m in range(1, total + 1) if total % m == 0), key=lambda m: abs(m - n))
        raise InputError(
            f"{type(scheduler).__name__} needs about a divisor of {total}, for example {near}",
            argument="num_inference_steps",
            value=n,
        )


def _uses_variance(scheduler: SchedulerMixin) -> bool:
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    return learned and isinstance(scheduler, DDPMScheduler)


def _taking_our_variance(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler, or a copy that expects noise alone: the DPM solvers cut learned-variance output to 3 channels."""
    if scheduler.config.get("variance_type") is None or isinstance(scheduler, DDPMScheduler):
        return scheduler
    return type(scheduler).from_config(scheduler.config, variance_type=None)


def _check_objective(scheduler: SchedulerMixin, output: Tensor, latents: Tensor) -> None:
    objective = objective_of(scheduler)
    if output.shape[1] != latents.shape[1] * (2 if objective == "ddpm" else 1):
        remedy = {
            "flow": f"its samplers are {', '.join(SAMPLERS['ddpm'])}",
            "ddpm": f"its samplers are {', '.join(SAMPLERS['flow'])}, and others that from_config makes with "
            "prediction_type='flow_prediction', use_flow_sigmas=True",
        }
        raise InputError(
            (
                f"it is for a {objective} model, and this model returns {output.shape[1]} channels for "
                f"{latents.shape[1]}"
            ),
            argument="scheduler",
            value=type(scheduler).__name__,
            remedy=remedy[objective],
        )


def _accepts(function: Callable, argument: str) -> bool:
    return argument in inspect.signature(function).parameters
