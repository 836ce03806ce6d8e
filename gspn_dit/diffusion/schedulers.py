"""Samplers: which of diffusers' schedulers, and of ours, integrate which objective, and with what settings."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
)
from torch import Tensor

from gspn_dit.diffusion.ddpm import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS
from gspn_dit.diffusion.edm import EDMHeunScheduler
from gspn_dit.diffusion.ode import FlowMatchDopri5Scheduler
from gspn_dit.diffusion.sde import FlowMatchSDEScheduler
from gspn_dit.errors import InputError, is_finite

SAMPLERS = {"ddpm": ("ddpm", "ddim", "dpm++", "edm"), "flow": ("euler", "heun", "sde", "dopri5", "edm")}
"""The samplers of each objective that have a short name; the first is its default."""

_CHAIN = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
_TRAINED = (*_CHAIN, "trained_betas", "rescale_betas_zero_snr", "invert_sigmas")  # what training has fixed
_RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_FLOW = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}  # of schedulers that integrate other things, too
_NAMED: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "ddpm": {
        "ddpm": (DDPMScheduler, {}),
        "ddim": (DDIMScheduler, {"timestep_spacing": "trailing"}),  # from the noisiest timestep in even steps to data
        "dpm++": (DPMSolverMultistepScheduler, {}),
        "edm": (EDMHeunScheduler, {}),
    },
    "flow": {
        "euler": (FlowMatchEulerDiscreteScheduler, {}),
        "heun": (FlowMatchHeunDiscreteScheduler, {}),
        "sde": (FlowMatchSDEScheduler, {}),
        "dopri5": (FlowMatchDopri5Scheduler, {}),
        "edm": (EDMHeunScheduler, {"prediction_type": "flow_prediction"}),
    },
}


def create_scheduler(
    objective: str,
    sampler: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    like: SchedulerMixin | None = None,
) -> SchedulerMixin:
    """The scheduler for an objective (`ddpm`, `flow`): one of its :data:`SAMPLERS`, or any of diffusers' by its class.

    `ddpm` is the ancestral chain with the learned variance over DiT's spacing, `ddim` the deterministic one, `dpm++`
    second-order multistep DPM-Solver++. `euler` and `heun` integrate the flow, `heun` with two forwards per step; `sde`
    is SiT's SDE (:class:`~gspn_dit.diffusion.sde.FlowMatchSDEScheduler`), and `dopri5` takes as many forwards as a
    tolerance asks for (:class:`~gspn_dit.diffusion.ode.FlowMatchDopri5Scheduler`). `edm` is EDM's sampler for either
    (:class:`~gspn_dit.diffusion.edm.EDMHeunScheduler`).

    Args:
        objective: `ddpm` or `flow`.
        sampler: Its name, or a class of diffusers, such as `UniPCMultistepScheduler`; None for the objective's first.
        options: What is to be other than by default: arguments of the scheduler's class.
        like: A scheduler of the same network, whose chain and prediction type are taken; None for DiT's.

    Raises :class:`InputError` for an unknown objective, a sampler that is not the objective's, or such options.
    """
    if objective not in SAMPLERS:
        raise InputError(argument="objective", value=objective, wanted=f"one of {', '.join(SAMPLERS)}")
    sampler = sampler or SAMPLERS[objective][0]
    if sampler in _NAMED[objective]:
        kind, settings = _NAMED[objective][sampler]
    else:
        kind, settings = _of_diffusers(objective, sampler)
    options = options or {}
    _check_options(kind, options)
    # The ddpm samplers are made from one config, which diffusers keeps whole in each of them: what one scheduler has no
    # use for (no clipping, the learned variance) is there again when a pipeline's scheduler is swapped for another.
    base: Mapping[str, Any] = {}
    chain = None
    if objective == "ddpm":
        trained = {} if like is None else {key: like.config[key] for key in _TRAINED if key in like.config}
        own = dict(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
        default = DDPMScheduler(**{**_CHAIN, **trained, **own})
        base, chain = default.config, default.alphas_cumprod
    made = _made(kind, base, settings, options)
    _check_process(made, chain, "sampler", sampler)
    check_flow(made, "scheduler_options", dict(options))
    return made


def with_options(scheduler: SchedulerMixin, options: Mapping[str, Any]) -> SchedulerMixin:
    """A scheduler of the same class and config but for some options. Raises as :func:`create_scheduler`."""
    kind = type(scheduler)
    _check_options(kind, options)
    made = _made(kind, scheduler.config, {}, options)
    _check_process(made, getattr(scheduler, "alphas_cumprod", None), "scheduler_options", dict(options))
    check_flow(made, "scheduler_options", dict(options))
    return made


def _made(
    kind: Any, config: Mapping[str, Any], settings: Mapping[str, Any], options: Mapping[str, Any]
) -> SchedulerMixin:
    """A scheduler of a class, of a config but for settings of ours and options of the user's.

    Raises :class:`InputError` for options that it refuses, or a package that it lacks.
    """
    try:
        # Not in the config: of that, diffusers drops what it says was left at its default.
        return kind.from_config(config, **{**settings, **options})
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        if isinstance(error, InputError) and error.argument is None:  # not of an option
            raise
        said = str(error) if isinstance(error, InputError) else f"{kind.__name__} says: {error}"
        raise InputError(" ".join(said.split())[:300], argument="scheduler_options", value=dict(options)) from error


def _of_diffusers(objective: str, name: str) -> tuple[Any, dict[str, Any]]:
    """A scheduler's class by its name, and what makes it integrate an objective. Raises :class:`InputError`."""

    def refuse(problem: str, remedy: str | None = None) -> InputError:
        return InputError(problem, argument="sampler", value=name, remedy=remedy)

    names = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    if name not in names:
        if close := difflib.get_close_matches(str(name), names, n=1):
            raise refuse("diffusers has no such scheduler", f"did you mean {close[0]}?")
        known = f"the {objective} objective is sampled with {', '.join(SAMPLERS[objective])}"
        raise refuse(f"{known}, or with a scheduler of diffusers by its class")
    kind: Any = getattr(diffusers, name)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise refuse("no scheduler for PyTorch, or a package that it needs is not installed")
    if not hasattr(kind, "step"):
        raise refuse("it has no step from one noise level to the next")
    takes, step = (inspect.signature(getattr(kind, method)).parameters for method in ("__init__", "step"))
    needs = [
        each for each in list(step.values())[4:] if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    ]
    if "Inverse" in name or needs:
        raise refuse("it does not go from noise to images")
    if name.startswith("Helios"):
        raise refuse("it is for a pyramid of resolutions")
    if objective == "ddpm" and name == "DDPMParallelScheduler":
        raise refuse("it leaves out the variance that the model has learned", "DDPMScheduler does the same with it")
    if "noise_sampler_seed" in takes and "generator" not in step:
        raise refuse("its noise comes from no generator, so that an image would depend on its batch")
    if objective == "flow" and not (name.startswith("FlowMatch") or "use_flow_sigmas" in takes):
        raise refuse("it does not integrate a flow", "UniPCMultistepScheduler and the FlowMatch… do")
    if objective == "ddpm" and not {"beta_start", "prediction_type"} <= takes.keys():
        raise refuse("it has no chain of noise, as the ddpm objective has", "DDIMScheduler and many others do")
    return kind, _FLOW if objective == "flow" and not name.startswith("FlowMatch") else {}


def _check_options(kind: Any, options: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` for what is no option of a scheduler's class, or was fixed by training."""
    takes = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    free = [name for name in takes if name not in (*_TRAINED, *_FLOW)]
    for name in options:
        if name in takes and name not in free:
            raise InputError(
                f"the model's training has fixed {name}",
                argument="scheduler_options",
                value=dict(options),
                remedy="leave it out",
            )
        if name not in takes:
            close = difflib.get_close_matches(name, free, n=1)
            raise InputError(
                f"{kind.__name__} has no {name}",
                argument="scheduler_options",
                value=dict(options),
                remedy=f"did you mean {close[0]}?" if close else f"it has {', '.join(free)}",
            )
        if name == "variance_type" and not issubclass(kind, DDPMScheduler):
            raise InputError(
                f"{kind.__name__} leaves out the learned variance, and has no other",
                argument="scheduler_options",
                value=dict(options),
                remedy="leave variance_type out",
            )


def _check_process(made: SchedulerMixin, chain: Tensor | None, argument: str, value: Any) -> None:
    """Raise :class:`InputError` for a scheduler of another chain ᾱ (T,) than the network's; None for a flow."""
    if chain is None or objective_of(made) == "flow":
        return
    own = getattr(made, "alphas_cumprod", None)
    if own is None or own.shape != chain.shape or not torch.allclose(own, chain, rtol=1e-4, atol=1e-6):
        raise InputError(
            f"{type(made).__name__} reverses a chain of noise that is not the model's", argument=argument, value=value
        )


def check_flow(scheduler: SchedulerMixin, argument: str, value: Any) -> None:
    """Raise :class:`InputError`, of an argument, for a scheduler of a flow whose options make it integrate another."""
    config, kind = scheduler.config, type(scheduler).__name__
    if objective_of(scheduler) != "flow":
        return
    problems = {
        "use_dynamic_shifting": (config.get("use_dynamic_shifting"), "nothing says by how much; a plain shift does"),
        "predict_x0": (config.get("predict_x0") is False, f"{kind} does not integrate a flow without it"),
    }
    if not kind.startswith("FlowMatch"):
        problems |= {
            name: (config.get(name), f"{kind} makes no levels of a flow with it; FlowMatchEulerDiscreteScheduler does")
            for name in _RESPACED
        }
    for name, (holds, problem) in problems.items():
        if holds:
            raise InputError(f"{name}: {problem}", argument=argument, value=value)


def objective_of(scheduler: SchedulerMixin) -> str:
    """Which objective's network a scheduler integrates: `flow` if it expects a velocity of the flow, else `ddpm`."""
    # The flow-matching schedulers know no prediction type; the others name theirs.
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    return "flow" if prediction == "flow_prediction" else "ddpm"


def trained_process(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What training has fixed of the process that a scheduler reverses, by the names of its config."""
    if objective_of(scheduler) == "flow":
        return {"prediction_type": "flow_prediction"}
    return {name: value for name in _TRAINED if (value := scheduler.config.get(name)) not in (None, False)}


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
            remedy="euler, heun and sde do",
        )
    still = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in scheduler.config else {}
    copy = kind.from_config(scheduler.config, **{option: float(shift)}, **still)
    if option == "shift" and hasattr(
        copy, "sigma_min"
    ):  # whose least level diffusers shifts when it makes the scheduler, and again with the others
        copy.sigma_min = kind.from_config(scheduler.config, shift=1.0, **still).sigma_min
    return copy


def _shift_option(scheduler: SchedulerMixin) -> str | None:
    """What a scheduler's config calls the shift of its flow's noise levels."""
    return next((name for name in ("shift", "flow_shift") if name in scheduler.config), None)
