"""A UNet's sampling loop as diffusers' Stable Diffusion pipelines have it: from noise, or from an image's latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor

from gspn_dit.diffusion.sampling import Generators, check_steps
from gspn_dit.inference.prompts import TextCondition


def set_steps(scheduler: SchedulerMixin, num_inference_steps: int, strength: float = 1.0) -> Tensor:
    """Set a scheduler's steps, and give the timesteps of those that are taken: one call of the UNet each.

    Args:
        scheduler: Of the UNet's noise schedule.
        num_inference_steps: Steps from pure noise.
        strength: Share of them that is taken, the last ones: as much noise as they remove is added to an image first
            (SDEdit, arXiv 2108.01073). 1 takes all of them.

    Raises :class:`InputError` for a number of steps that the scheduler cannot take.
    """
    check_steps(scheduler, num_inference_steps)
    scheduler.set_timesteps(num_inference_steps, device="cpu")  # where their tables are
    begin = (num_inference_steps - int(num_inference_steps * strength)) * scheduler.order
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]


def fresh(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A scheduler of the same settings that remembers nothing of an earlier image."""
    return type(scheduler).from_config(scheduler.config)


@torch.no_grad()
def draw_latents(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    noise: Tensor,
    condition: TextCondition,
    null_condition: TextCondition | None = None,
    *,
    image_size: tuple[int, int],
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    begin: Tensor | None = None,
    strength: float = 1.0,
    generator: Generators = None,
    guidance_in_slices: bool = False,
    after_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Latents (B, C, h, w), float32, of texts.

    Args:
        unet: The model; its calls are in its own dtype.
        scheduler: Any of diffusers for the UNet's noise schedule; it is left as it was.
        noise: (B, C, h, w), standard normal, on the UNet's device.
        condition: Of B texts.
        null_condition: What guidance leads away from; only a guidance_scale above 1 needs it.
        image_size: Height and width in pixels, which SD-XL is told.
        num_inference_steps: Steps from pure noise.
        guidance_scale: w of ε(∅) + w·(ε(c) - ε(∅)) (Ho & Salimans, arXiv 2207.12598); 1 is none.
        begin: Latents to begin with, to which noise is added by `strength`; None begins with the noise alone.
        strength: As :func:`set_steps`.
        generator: Of the noise that stochastic samplers add; with a list, image b's comes from the b-th alone.
        guidance_in_slices: Call the UNet for the texts and for the null texts one after the other, not as one batch.
        after_step: Called after each step.

    Raises :class:`InputError` for a number of steps that the scheduler cannot take.
    """
    scheduler = fresh(scheduler)
    timesteps = set_steps(scheduler, num_inference_steps, strength)
    if begin is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(begin, noise, timesteps[:1].expand(len(noise)))
    groups = [condition]
    if null_condition is not None and guidance_scale > 1:
        groups = [null_condition, condition] if guidance_in_slices else [null_condition + condition]
    arguments = [group.arguments(image_size) for group in groups]
    step_options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in timesteps:
        inputs = scheduler.scale_model_input(latents, timestep).to(unet.dtype)
        told = timestep.to(inputs.device)
        outputs = [
            unet(
                inputs.repeat(len(each["encoder_hidden_states"]) // len(inputs), 1, 1, 1),
                told,
                return_dict=False,
                **each,
            )[0].float()
            for each in arguments
        ]
        prediction, *conditional = outputs if guidance_in_slices else outputs[0].split(len(inputs))
        for other in conditional:
            prediction = prediction + guidance_scale * (other - prediction)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **step_options)[0]
        after_step()
    return latents
