"""The sampling loop: noise to latents with guidance, through any of diffusers' schedulers or of ours."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
)
from torch import Tensor

from gspn_dit.arguments import check_num_inference_steps
from gspn_dit.diffusion.edm import EDMHeunScheduler
from gspn_dit.diffusion.guiding import Guider
from gspn_dit.diffusion.integrator import Generators, Integrator, check_descending
from gspn_dit.diffusion.process import Process
from gspn_dit.diffusion.schedulers import SAMPLERS, check_flow, objective_of
from gspn_dit.errors import InputError
from gspn_dit.guidance import Guidance


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
    guide: Callable[..., Tensor] | None = None,
    model_options: Mapping[str, Any] | None = None,
    guide_options: Mapping[str, Any] | None = None,
    guided_channels: int | None = None,
    num_inference_steps: int = 50,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    generator: Generators = None,
    callback: Callable[[int, Any, Tensor, Tensor], Tensor | None] | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
    **guidance: Any,
) -> Tensor:
    """Integrate standard normal noise (B,C,h,w) to clean latents of the same shape, float32.

    Args:
        model: Called as model(latents, timesteps (B,) on the scale 0…1000, **condition, **model_options) ->
            (B,C,h,w), or (B,2C,h,w) with the learned variance.
        scheduler: Any diffusers scheduler for the model's objective, or one of this package.
        noise: (B,C,h,w), standard normal, on the model's device.
        condition: What the images are to be, tensors (B, …) by the names of the model's arguments, on its device.
        null_condition: The condition that says nothing, of the same names and shapes. Only classifier-free guidance
            needs it.
        guide: A model of the same kind that predicts worse: guidance leads away from its prediction with the same
            condition, in place of that without one (autoguidance, Karras et al., arXiv 2406.02507).
        model_options: Further arguments of the model, the same at every step.
        guide_options: Further arguments of the guide.
        guided_channels: How many of the latent channels are guided, from the first on; None is all. The others stay the
            model's with the condition.
        num_inference_steps: Steps of the scheduler.
        sigmas: Noise levels in place of the scheduler's own, as diffusers' `set_timesteps` takes them, without 0.
        timesteps: Timesteps in place of the scheduler's own.
        generator: Of the noise that stochastic samplers add; with a list, image b's comes from the b-th alone.
        callback: Called as callback(step, timestep, latents, prediction) after each step, with the last guided
            prediction; what it returns, if not None, replaces the latents.
        progress: Wraps the iterable of timesteps, as `tqdm` does.
        guidance: How it is guided, by the names of :class:`~gspn_dit.guidance.Guidance`; by default not at all. The
            learned variance stays the model's with the condition.

    Raises :class:`InputError` for options out of range, a null condition that is missing or does not fit, steps that
    the scheduler does not take, or a model that is not of the scheduler's objective.
    """
    scheduler = _taking_our_variance(scheduler)
    guided = Guidance(**guidance)
    check_guidance_of(scheduler, guided)
    _set_timesteps(scheduler, num_inference_steps, sigmas, timesteps)
    network = GuidedNetwork(
        model,
        scheduler,
        condition,
        null_condition=null_condition,
        guide=guide,
        guidance=guided,
        model_options=model_options,
        guide_options=guide_options,
        guided_channels=guided_channels,
    )
    if isinstance(scheduler, Integrator):

        def after_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
            replaced = None if callback is None else callback(step, timestep, latents, network.prediction)
            return latents if replaced is None else replaced

        return scheduler.integrate(
            network, noise.float(), generator=generator, after_step=after_step, progress=progress
        )
    step_options = {"generator": generator} if _accepts(scheduler.step, "generator") else {}
    latents = noise.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    told = scheduler.timesteps.float().tolist()
    for step, timestep in enumerate(progress(scheduler.timesteps)):
        inputs = latents
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(latents, timestep)
        prediction = network(inputs, told[step])
        if _uses_variance(scheduler):
            prediction = torch.cat([prediction, network.variance], dim=1)
        latents = scheduler.step(prediction, timestep, latents, **step_options).prev_sample
        if callback is not None:
            replaced = callback(step, timestep, latents, network.prediction)
            latents = latents if replaced is None else replaced
    return latents


class GuidedNetwork:
    """A network with its condition and guidance: called with noisy latents and a timestep, it gives the prediction.

    Args:
        model: As in :func:`denoise`, as are all others.
        scheduler: What asks.
        condition: See there.
        null_condition: See there.
        guide: See there.
        guidance: How it is guided.
        model_options: See there.
        guide_options: See there.
        guided_channels: See there.

    Attributes:
        variance: The learned variance beside the last prediction, of no channels where there is none.

    Raises :class:`InputError` for a null condition that is missing or does not fit.
    """

    variance: Tensor
    _prediction: Tensor

    def __init__(
        self,
        model: Callable[..., Tensor],
        scheduler: SchedulerMixin,
        condition: Mapping[str, Tensor],
        *,
        null_condition: Mapping[str, Tensor] | None,
        guide: Callable[..., Tensor] | None,
        guidance: Guidance,
        model_options: Mapping[str, Any] | None,
        guide_options: Mapping[str, Any] | None,
        guided_channels: int | None = None,
    ) -> None:
        self.model, self.scheduler, self.guide, self.guidance = model, scheduler, guide, guidance
        self.condition, self.guided_channels = condition, guided_channels
        self.model_options, self.guide_options = model_options or {}, guide_options or {}
        self.both: dict[str, Tensor] = {}
        if guide is None and guidance.guidance_scale != 1:
            self.both = _with_null(condition, null_condition, guidance.guidance_scale)
        self.guider = Guider(guidance, Process.of(scheduler)) if guidance.guidance_scale != 1 else None
        self._alone: list[GuidedNetwork] = []

    @property
    def prediction(self) -> Tensor:
        """The last that was given; of images alone, the last of each."""
        return torch.cat([each.prediction for each in self._alone]) if self._alone else self._prediction

    def image(self, i: int) -> GuidedNetwork:
        """The same for image i of the batch alone."""
        alone = copy(self)
        alone._alone = []
        alone.condition = {name: tensor[i : i + 1] for name, tensor in self.condition.items()}
        if self.both:
            count = len(next(iter(self.both.values()))) // 2
            alone.both = {name: tensor[[i, count + i]] for name, tensor in self.both.items()}
        self._alone.append(alone)
        return alone

    def __call__(self, noisy: Tensor, timestep: float) -> Tensor:
        """The guided prediction, float32 (B,C,h,w), from noisy latents (B,C,h,w) at a timestep on the scale 0…1000."""
        weight = self.guidance.weight(min(timestep / 1000, 1.0))  # a shifted one may be rounded up from 1
        channels = noisy.shape[1]
        inputs = noisy.to(getattr(self.model, "dtype", torch.float32))
        times = torch.full((len(noisy),), timestep, dtype=torch.float32, device=noisy.device)
        if weight != 1 and self.guide is None:
            twice = self.model(inputs.repeat(2, 1, 1, 1), times.repeat(2), **self.both, **self.model_options)
            output, worse = twice.float().chunk(2)
        else:
            output = self.model(inputs, times, **self.condition, **self.model_options).float()
            if weight != 1 and self.guide is not None:
                inputs = noisy.to(getattr(self.guide, "dtype", torch.float32))
                worse = self.guide(inputs, times, **self.condition, **self.guide_options).float()
        _check_objective(self.scheduler, output, channels)
        self._prediction, self.variance = output.split([channels, output.shape[1] - channels], dim=1)
        if weight != 1 and self.guider is not None:
            guided = slice(channels if self.guided_channels is None else self.guided_channels)
            better, rest = self._prediction[:, guided], self._prediction[:, guided.stop :]
            better = self.guider(better, worse[:, guided], weight, noisy[:, guided], timestep)
            self._prediction = torch.cat([better, rest], dim=1)
        return self._prediction


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


def check_levels(
    scheduler: SchedulerMixin, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None
) -> dict[str, Any]:
    """The noise levels or timesteps that a call gives, as the scheduler takes them; none if it gives none.

    Raises :class:`InputError` for both, for what a scheduler does not take, or for what does not fall.
    """
    flow = objective_of(scheduler) == "flow"
    given = {name: each for name, each in (("sigmas", sigmas), ("timesteps", timesteps)) if each is not None}
    if len(given) > 1:
        raise InputError("only one of timesteps and sigmas", argument="sigmas", value=sigmas, remedy="leave one out")
    for name, values in given.items():
        if not _accepts(scheduler.set_timesteps, name):
            raise InputError(
                f"{type(scheduler).__name__} takes none", argument=name, value=values, remedy="leave it out"
            )
        if flow and name == "timesteps" and not type(scheduler).__name__.startswith("FlowMatch"):
            raise InputError(
                f"{type(scheduler).__name__} takes none of a flow", argument=name, value=values, remedy="leave it out"
            )
        levels = np.asarray(values, dtype=np.float64)
        share = name == "sigmas" and flow and not isinstance(scheduler, EDMHeunScheduler)
        most = 1 if share else scheduler.config.num_train_timesteps if name == "timesteps" else math.inf
        check_descending(name, levels.flatten().tolist(), most, least_is_open=name == "sigmas")
        if name == "timesteps" and flow and _accepts(scheduler.set_timesteps, "sigmas"):
            return {name: levels.tolist(), "sigmas": levels / scheduler.config.num_train_timesteps}
        if name == "sigmas" and isinstance(scheduler, EulerDiscreteScheduler):
            levels = np.append(levels, 0.0)  # the one class that does not append it
        return {name: levels if name == "sigmas" else levels.tolist()}
    return {}


def check_guidance_of(scheduler: SchedulerMixin, guidance: Guidance) -> None:
    """Raise :class:`InputError` for guidance that a sampler cannot follow: momentum, over times that it chooses."""
    chooses = isinstance(scheduler, Integrator) and scheduler.chooses_times
    if chooses and guidance.guidance_scale != 1 and guidance.apg_momentum:
        raise InputError(
            f"{type(scheduler).__name__} asks at times in no order",
            argument="apg_momentum",
            value=guidance.apg_momentum,
            remedy="give 0, or another sampler",
        )


def _set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
) -> None:
    """Set the scheduler's steps: those given; else for the flow, when it takes noise levels, even ones from 1 to 1/n.

    They stay on the CPU: samplers look up their tables by them, and compare them, which on a GPU would wait for it.

    Raises :class:`InputError` for steps that it does not take.
    """
    check_flow(scheduler, "scheduler", type(scheduler).__name__)
    if given := check_levels(scheduler, sigmas, timesteps):
        name, values = ("sigmas", sigmas) if timesteps is None else ("timesteps", timesteps)
        with _refusing(scheduler, name, values):  # of a scheduler that takes them with some options only
            scheduler.set_timesteps(device="cpu", **given)
        if name == "timesteps" and objective_of(scheduler) == "flow":
            told = scheduler.timesteps.double().cpu().numpy()
            noise = scheduler.sigmas[: len(told)].double().cpu().numpy() * scheduler.config.num_train_timesteps
            if not np.allclose(told, noise, atol=0.01):
                raise InputError(
                    f"the shift or spacing of {type(scheduler).__name__} would give them other noise levels",
                    argument=name,
                    value=values,
                    remedy="give sigmas, or no shift",
                )
        return
    _check_count(scheduler, num_inference_steps)
    levels = {}
    chooses = isinstance(scheduler, Integrator)
    if objective_of(scheduler) == "flow" and not chooses and _accepts(scheduler.set_timesteps, "sigmas"):
        # Left alone, diffusers' last step goes from 0.001 to 0: a forward for nothing.
        levels = {"sigmas": np.linspace(1, 1 / num_inference_steps, num_inference_steps)}
    with _refusing(scheduler, "num_inference_steps", num_inference_steps):
        scheduler.set_timesteps(num_inference_steps, device="cpu", **levels)


@contextmanager
def _refusing(scheduler: SchedulerMixin, argument: str, value: Any) -> Iterator[None]:
    """What a scheduler of diffusers says against an argument, or stumbles over, as an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError, AssertionError) as error:
        said = f"{type(scheduler).__name__} says: {' '.join(str(error).split())}"
        raise InputError(said[:300], argument=argument, value=value) from error


def check_steps(scheduler: SchedulerMixin, n: int) -> None:
    """Raise :class:`InputError` for a number of steps that a scheduler refuses, or at which it would quietly be wrong.

    The scheduler is left as it was.
    """
    _set_timesteps(copy(scheduler), n, None, None)


def _check_count(scheduler: SchedulerMixin, n: int) -> None:
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


def _check_objective(scheduler: SchedulerMixin, output: Tensor, channels: int) -> None:
    objective = objective_of(scheduler)
    if output.shape[1] != channels * (2 if objective == "ddpm" else 1):
        remedy = {
            "flow": f"its samplers are {', '.join(SAMPLERS['ddpm'])}",
            "ddpm": f"its samplers are {', '.join(SAMPLERS['flow'])}, and others that from_config makes with "
            "prediction_type='flow_prediction', use_flow_sigmas=True",
        }
        raise InputError(
            (f"it is for a {objective} model, and this model returns {output.shape[1]} channels for {channels}"),
            argument="scheduler",
            value=type(scheduler).__name__,
            remedy=remedy[objective],
        )


def _accepts(function: Callable, argument: str) -> bool:
    return argument in inspect.signature(function).parameters
