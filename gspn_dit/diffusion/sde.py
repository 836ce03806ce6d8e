"""SiT's stochastic sampler: the reverse-time SDE of the straight path, by Euler-Maruyama or Heun's method.

Ma et al. 2024 (SiT, arXiv 2401.08740), section 2 for the SDE and appendix for the diffusion coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from gspn_dit.diffusion.integrator import Generators, Integrator, Network, check_descending, check_numbers
from gspn_dit.errors import InputError

# Half the diffusion coefficient, D = w/2, at the time t, 0 clean and 1 noise, by the name and with the norm n.
DIFFUSION_FORMS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda t, n: n,
    "sbdm": lambda t, n: n * t / max(1 - t, 1e-3),  # infinite at pure noise
    "sigma": lambda t, n: n * t,
    "linear": lambda t, n: n * t,
    "decreasing": lambda t, n: 0.25 * (1 - n * math.cos(math.pi * t)) ** 2,
    "increasing-decreasing": lambda t, n: n * math.sin(math.pi * t) ** 2,
}
LAST_STEPS = ("mean", "tweedie", "euler", "none")
SAMPLING_METHODS = ("euler", "heun")


class FlowMatchSDEScheduler(Integrator):
    """dx = (v - D·s) dt + √(2D) dW from t = 1, noise, back to t = 0, with the score s = -(x + (1-t)·v) / t.

    v is the network's velocity, and w = 2D the diffusion coefficient of 2401.08740: whatever it is, the images have the
    same distribution where the network is exact. On the straight path, `linear` is `sigma`.

    Args:
        num_train_timesteps: 1000, what the network is told at t = 1.
        sampling_method: `euler` (Euler-Maruyama, one forward a step), or `heun`, which adds a step's noise first and
            then corrects its drift, with two.
        diffusion_form: D by name: one of :data:`DIFFUSION_FORMS`.
        diffusion_norm: A factor of D; of `decreasing`, of the cosine in it.
        last_step: How the last step, to t = 0, is done: `mean` is a step without its noise; `tweedie` is the mean of
            the clean latents given the noisy ones; `euler` is a step of the ODE, which on the straight path is the same
            as `tweedie`; `none` is a step as all others.
        last_step_size: t where the last step begins, before the shift; without meaning for `none`, and where a call
            gives noise levels.
        shift: Noise levels t become s·t / (1 + (s - 1)·t), as in diffusers' flow-matching schedulers.

    Raises :class:`InputError` for what cannot be.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sampling_method: Literal["euler", "heun"] = "euler",
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: Literal["mean", "tweedie", "euler", "none"] = "mean",
        last_step_size: float = 0.04,
        shift: float = 1.0,
    ) -> None:
        for name, value, names in (
            ("sampling_method", sampling_method, SAMPLING_METHODS),
            ("diffusion_form", diffusion_form, tuple(DIFFUSION_FORMS)),
            ("last_step", last_step, LAST_STEPS),
        ):
            if value not in names:
                raise InputError(argument=name, value=value, wanted=f"one of {', '.join(names)}")
        check_numbers(
            {"diffusion_norm": diffusion_norm, "last_step_size": last_step_size, "shift": shift},
            diffusion_norm=(lambda x: x >= 0, "0 or more"),
            last_step_size=(lambda x: 0 < x < 1, "a time between 0 and 1"),
            shift=(lambda x: x > 0, "a positive number"),
        )
        self.set_timesteps(50)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Sequence[float] | None = None
    ) -> None:
        """Even steps of t, the last of last_step_size; or from the levels t that `sigmas` says, down to 0.

        Raises :class:`InputError` for levels that do not fall, or a single step that is the last, `mean`.
        """
        if sigmas is not None:
            check_descending("sigmas", sigmas, 1)
            levels = np.asarray(sigmas, dtype=np.float64)
        else:
            n = num_inference_steps or 1
            if n == 1 and self.config.last_step == "mean":  # at pure noise, where the score is not known
                raise InputError(argument="num_inference_steps", value=1, wanted="2 or more with last_step mean")
            end = 1 / n if self.config.last_step == "none" else self.config.last_step_size
            levels = np.linspace(1, end, n)
        shift = self.config.shift
        self.sigmas = shift * levels / (1 + (shift - 1) * levels)
        self.timesteps = torch.from_numpy(self.sigmas * self.config.num_train_timesteps).to(device)

    def diffusion(self, t: float) -> float:
        """D at a time."""
        return DIFFUSION_FORMS[self.config.diffusion_form](t, self.config.diffusion_norm)

    def drift(self, network: Network, x: Tensor, t: float, diffusion: float) -> Tensor:
        """What x changes by in a unit of time towards t = 0: -v + D·s."""
        velocity = network(x, t * self.config.num_train_timesteps)
        if diffusion == 0:
            return -velocity
        return -velocity - diffusion * ((1 - t) * velocity + x) / t

    def integrate(
        self,
        network: Network,
        noise: Tensor,
        *,
        generator: Generators,
        after_step: Callable[[int, Tensor, Tensor], Tensor],
        progress: Callable[[Iterable], Iterable],
    ) -> Tensor:
        """As :meth:`Integrator.integrate`."""
        x, times = noise, [*self.sigmas.tolist(), 0.0]
        last = len(times) - 2 if self.config.last_step != "none" else None
        for i, timestep in enumerate(progress(self.timesteps)):
            if i == last:
                diffusion = self.diffusion(times[i]) if self.config.last_step == "mean" else 0.0
                x = x + times[i] * self.drift(network, x, times[i], diffusion)
            else:
                x = self._step(network, x, times[i], times[i + 1], generator)
            x = after_step(i, timestep, x)
        return x

    def _step(self, network: Network, x: Tensor, t: float, to: float, generator: Generators) -> Tensor:
        """A step with noise."""
        size, diffusion = t - to, self.diffusion(t)
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        added = math.sqrt(2 * diffusion * size) * noise
        if self.config.sampling_method == "euler":
            return x + size * self.drift(network, x, t, diffusion) + added
        x = x + added
        drift = self.drift(network, x, t, diffusion)
        if to == 0:  # where there is no score
            return x + size * drift
        return x + size / 2 * (drift + self.drift(network, x + size * drift, to, self.diffusion(to)))
