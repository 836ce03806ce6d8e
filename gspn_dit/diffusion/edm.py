"""EDM's sampler: Heun's method over σ, with noise added and taken away again (churn).

Karras et al. 2022 (EDM, arXiv 2206.00364), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from gspn_dit.diffusion.ddpm import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS
from gspn_dit.diffusion.integrator import Generators, Integrator, Network, check_descending, check_numbers
from gspn_dit.diffusion.process import Process
from gspn_dit.errors import InputError


class EDMHeunScheduler(Integrator):
    """dx/dσ = (x - D(x; σ))/σ for x = clean + σ·noise, with D the clean latents that the network implies.

    Of a flow σ is t/(1-t), of a chain √(1-ᾱ)/√ᾱ at a step, the nearest there is (2206.00364, appendix C.3.4).

    Args:
        num_train_timesteps: Of the chain, as the next five are.
        beta_start: β of its first step.
        beta_end: β of its last step.
        beta_schedule: As in diffusers.
        trained_betas: All β in place of these.
        rescale_betas_zero_snr: As in diffusers.
        prediction_type: `epsilon`, `v_prediction` or `flow_prediction`; the last has no chain.
        sigma_min: The least σ before 0; of a chain at least its own.
        sigma_max: The greatest σ; of a chain at most its own.
        rho: Of the steps between them (eq. 5); 7 is Karras et al.'s.
        S_churn: How much noise is added, over all steps; 0 is the deterministic sampler.
        S_tmin: The least σ at which it is.
        S_tmax: The greatest σ at which it is; None for any.
        S_noise: Standard deviation of that noise.

    Raises :class:`InputError` for what cannot be.
    """

    order = 2
    _compatibles: ClassVar[list[str]] = [each.name for each in KarrasDiffusionSchedulers]  # whose config it can read

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
        beta_start: float = BETA_START,
        beta_end: float = BETA_END,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        S_churn: float = 0.0,
        S_tmin: float = 0.0,
        S_tmax: float | None = None,
        S_noise: float = 1.0,
    ) -> None:
        given = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
        given |= {"S_churn": S_churn, "S_tmin": S_tmin, "S_tmax": 0.0 if S_tmax is None else S_tmax, "S_noise": S_noise}
        check_numbers(
            given,
            sigma_min=(lambda x: x > 0, "a positive number"),
            sigma_max=(lambda x: x > sigma_min, f"more than sigma_min, {sigma_min}"),
            rho=(lambda x: x > 0, "a positive number"),
            **dict.fromkeys(("S_churn", "S_tmin", "S_tmax", "S_noise"), (lambda x: x >= 0, "0 or more")),
        )
        if prediction_type != "flow_prediction":
            self.alphas_cumprod = DDPMScheduler(
                num_train_timesteps=num_train_timesteps,
                beta_start=beta_start,
                beta_end=beta_end,
                beta_schedule=beta_schedule,
                trained_betas=trained_betas,
                rescale_betas_zero_snr=rescale_betas_zero_snr,
            ).alphas_cumprod
        self.process = Process.of(self)
        self.set_timesteps(18)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Sequence[float] | None = None
    ) -> None:
        """σ of eq. 5 from the greatest to the least, or those given; the last step goes to 0."""
        if sigmas is not None:
            check_descending("sigmas", sigmas, math.inf)
            levels = [float(sigma) for sigma in sigmas]
        else:
            low, high = self._limits()
            n, rho = num_inference_steps or 1, self.config.rho
            share = np.linspace(0, 1, n)
            levels = ((high ** (1 / rho) + share * (low ** (1 / rho) - high ** (1 / rho))) ** rho).tolist()
        self.sigmas = [self.rounded(sigma) for sigma in levels]
        self.timesteps = torch.tensor([self.process.timestep(sigma) for sigma in self.sigmas], device=device)

    def _limits(self) -> tuple[float, float]:
        """The least and the greatest σ. Raises :class:`InputError` if a chain has none between those wanted."""
        low, high = self.config.sigma_min, self.config.sigma_max
        if self.config.prediction_type == "flow_prediction":
            return low, high
        own = self.process.ratio(0), self.process.ratio(self.config.num_train_timesteps - 1)
        least, greatest = max(low, own[0]), min(high, own[1])
        if not least < greatest:
            raise InputError(
                f"the chain's σ go from {own[0]:.3g} to {own[1]:.3g}",
                argument="sigma_min",
                value=low,
                wanted="a range of σ that meets them",
            )
        return least, greatest

    def rounded(self, sigma: float) -> float:
        """The nearest σ that the network knows."""
        if self.config.prediction_type == "flow_prediction":
            return sigma
        return self.process.ratio(self.process.timestep(sigma))

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
        x, sigmas = noise * self.sigmas[0], [*self.sigmas, 0.0]
        for i, timestep in enumerate(progress(self.timesteps)):
            sigma, to = sigmas[i], sigmas[i + 1]
            higher = self.rounded(sigma * (1 + self.churn(sigma)))
            if higher > sigma:
                added = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                x = x + math.sqrt(higher**2 - sigma**2) * self.config.S_noise * added
            slope = self.slope(network, x, higher)
            ahead = x + (to - higher) * slope
            if to > 0:
                ahead = x + (to - higher) / 2 * (slope + self.slope(network, ahead, to))
            x = after_step(i, timestep, ahead)
        return x

    def churn(self, sigma: float) -> float:
        """γ: by which share σ is raised before a step."""
        top = math.inf if self.config.S_tmax is None else self.config.S_tmax
        if not self.config.S_tmin <= sigma <= top:
            return 0.0
        return min(self.config.S_churn / len(self.sigmas), math.sqrt(2) - 1)

    def slope(self, network: Network, x: Tensor, sigma: float) -> Tensor:
        """dx/dσ."""
        timestep = self.process.timestep(sigma)
        alpha, _ = self.process.levels(timestep)
        noisy = alpha * x
        return (x - self.process.clean(noisy, network(noisy, timestep), timestep)) / sigma
