"""Samplers: which of diffusers' schedulers integrate which objective, and with what settings."""

from __future__ import annotations

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
)

from gspn_dit.diffusion.ddpm import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS
from gspn_dit.errors import InputError, is_finite

SAMPLERS = {"ddpm": ("ddpm", "ddim", "dpm++"), "flow": ("euler", "heun")}
"""The samplers of each objective; the first is its default."""

_CHAIN = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}


def create_scheduler(objective: str, sampler: str | None = None) -> SchedulerMixin:
    """The diffusers scheduler for an objective (`ddpm` or `flow`) and one of its :data:`SAMPLERS`.

    `ddpm` is the ancestral chain with the learned variance over DiT's spacing, `ddim` the deterministic one, `dpm++`
    second-order multistep DPM-Solver++; `euler` and `heun` integrate the flow, `heun` with two forwards per step.

    Raises :class:`InputError` for an unknown objective, or a sampler that is not the objective's.
    """
    if objective not in SAMPLERS:
        raise InputError(argument="objective", value=objective, wanted=f"one of {', '.join(SAMPLERS)}")
    sampler = sampler or SAMPLERS[objective][0]
    if sampler not in SAMPLERS[objective]:
        raise InputError(
            f"the {objective} objective is sampled with {', '.join(SAMPLERS[objective])}",
            argument="sampler",
            value=sampler,
        )
    # The ddpm samplers are made from one config, which diffusers keeps whole in each of them: what one scheduler has no
    # use for (no clipping, the learned variance) is there again when a pipeline's scheduler is swapped for another.
    chain = DDPMScheduler(**_CHAIN, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    match sampler:
        case "ddpm":
            return chain
        case "ddim":  # trailing: from the noisiest timestep in even steps to clean data
            return DDIMScheduler.from_config(chain.config, timestep_spacing="trailing")
        case "dpm++":
            return DPMSolverMultistepScheduler.from_config(chain.config)
        case "euler":
            return FlowMatchEulerDiscreteScheduler()
        case _:
            return FlowMatchHeunDiscreteScheduler()


def objective_of(scheduler: SchedulerMixin) -> str:
    """Which objective's network a scheduler integrates: `flow` if it expects a velocity of the flow, else `ddpm`."""
    # The flow-matching schedulers know no prediction type; the others name theirs.
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    return "flow" if prediction == "flow_prediction" else "ddpm"


def own_shift(scheduler: SchedulerMixin) -> float:
    """The noise shift that a scheduler's config has; 1 is none."""
    return float(scheduler.config.get(_shift_option(scheduler) or "", 1.0))


def shifted(scheduler: SchedulerMixin, shift: float) -> SchedulerMixin:
    """A copy of a flow scheduler whose noise levels are σ' = s·σ / (1 + (s - 1)·σ), with s in place of its own shift.

    Noise hides a large image less than a small one, whose pixels each stand for several of its own: s = √(m/n) at m
    pixels puts as much uncertainty into a step as training had at n (Esser et al., arXiv 2403.03206, section 5.3.2).

    Raises :class:`InputError` for a shift that is not positive, or a scheduler of the ddpm objective or without shift.
    """
    if not is_finite(shift) or shift <= 0:
        raise InputError(argument="shift", value=shift, wanted="a positive number, or auto")
    kind, option = type(scheduler), _shift_option(scheduler)
    if objective_of(scheduler) != "flow":
        raise InputError(
            f"{kind.__name__} samples the ddpm objective, whose noise levels are fixed by its chain",
            argument="shift",
            value=shift,
            remedy="only flow models have a shift, leave it out",
        )
    if option is None:
        raise InputError(
            f"{kind.__name__} has no shift",
            argument="shift",
            value=shift,
            remedy=f"{' and '.join(SAMPLERS['flow'])} do",
        )
    still = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in scheduler.config else {}
    copy = kind.from_config(scheduler.config, **{option: float(shift)}, **still)
    if option == "shift":  # whose least level diffusers shifts when it makes the scheduler, and again with the others
        copy.sigma_min = kind.from_config(scheduler.config, shift=1.0, **still).sigma_min
    return copy


def _shift_option(scheduler: SchedulerMixin) -> str | None:
    """What a scheduler's config calls the shift of its flow's noise levels."""
    return next((name for name in ("shift", "flow_shift") if name in scheduler.config), None)
