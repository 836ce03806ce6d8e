"""The objective of Stable Diffusion: the noise, or the velocity, of a chain that a diffusers scheduler describes.

Ho et al. 2020 (arXiv 2006.11239) for the chain, Salimans & Ho 2022 (arXiv 2202.00512) for the velocity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor, nn

from gspn_dit.diffusion.objective import Batch
from gspn_dit.errors import InputError

PredictionType = Literal["epsilon", "v_prediction"]
CHAIN = {  # of Stable Diffusion 1 and 2 and of SD-XL
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
SAMPLERS_OF_STABLE_DIFFUSION = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}


class StableDiffusion:
    """Prediction of the noise ε, or of the velocity v = √ᾱ_t ε - √(1-ᾱ_t) x, of x_t = √ᾱ_t x + √(1-ᾱ_t) ε.

    Values are the same as those of diffusers' `add_noise` and `get_velocity`, to the last bit.

    Args:
        alphas_cumprod: ᾱ_t of every step t of the chain, (T,) float32.
        prediction_type: `epsilon` or `v_prediction`.
        min_snr_gamma: γ of the weight min(SNR, γ), SNR = ᾱ_t / (1-ᾱ_t), on the squared error of the clean latents that
            a prediction implies (Hang et al., arXiv 2303.09556); None for a weight of 1 on that of the prediction.

    Raises :class:`InputError` for another prediction type.
    """

    def __init__(
        self, alphas_cumprod: Tensor, prediction_type: str = "epsilon", min_snr_gamma: float | None = None
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(argument="prediction_type", value=prediction_type, wanted="epsilon or v_prediction")
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type
        self.min_snr_gamma = min_snr_gamma

    @classmethod
    def of(cls, scheduler: SchedulerMixin, min_snr_gamma: float | None = None) -> StableDiffusion:
        """The objective of the network that a diffusers scheduler samples.

        Raises :class:`InputError` as the class does, and for a scheduler of another process, such as EDM's or a flow's.
        """
        if not hasattr(scheduler, "alphas_cumprod"):
            raise InputError(
                f"a {type(scheduler).__name__} describes no chain of noise",
                argument="scheduler",
                wanted="one of Stable Diffusion 1, 2 or SD-XL, such as DDIMScheduler",
            )
        return cls(scheduler.alphas_cumprod.float(), scheduler.config.prediction_type, min_snr_gamma)

    @property
    def num_train_timesteps(self) -> int:
        """T, the steps of the chain."""
        return len(self.alphas_cumprod)

    def times(self, u: Tensor) -> Tensor:
        """Timesteps (B,) long, 0…T-1, from uniform numbers u (B,) in [0, 1)."""
        return (u.double() * self.num_train_timesteps).long()

    def noisy(self, clean: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x + √(1-ᾱ_t) ε (2006.11239 eq. 4), (B, C, h, w)."""
        signal = self._signal(times)
        return signal**0.5 * clean + (1 - signal) ** 0.5 * noise

    def target(self, clean: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """What the network is to predict, (B, C, h, w): ε, or the velocity (2202.00512 section 4)."""
        if self.prediction_type == "epsilon":
            return noise
        signal = self._signal(times)
        return signal**0.5 * noise - (1 - signal) ** 0.5 * clean

    def weight(self, times: Tensor) -> Tensor:
        """The weight (B,) of the squared error at the times (2303.09556 section 3.4)."""
        signal = self._signal(times).flatten()
        if self.min_snr_gamma is None:
            return torch.ones_like(signal)
        snr = signal / (1 - signal)
        clamped = snr.clamp(max=self.min_snr_gamma)
        return clamped / (snr if self.prediction_type == "epsilon" else snr + 1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The weighted mean squared error of the prediction, per sample: (B,) float32.

        Args:
            model: Called as model(noisy latents (B, C, h, w), timesteps (B,) long, **condition) -> (B, C, h, w).
            batch: Its times are :meth:`times` of `u`; its condition is passed on unread.
        """
        clean, noise, times = batch["latents"].float(), batch["noise"].float(), self.times(batch["u"])
        predicted = model(self.noisy(clean, times, noise), times, **batch["condition"]).float()
        errors = (predicted - self.target(clean, times, noise)).square().flatten(1).mean(1)
        return self.weight(times) * errors

    def _signal(self, times: Tensor) -> Tensor:
        """ᾱ_t of the times (B,), shaped (B, 1, 1, 1)."""
        if self.alphas_cumprod.device != times.device:
            self.alphas_cumprod = self.alphas_cumprod.to(times.device)
        return self.alphas_cumprod[times].view(-1, 1, 1, 1)


def stable_diffusion_scheduler(sampler: str = "ddim", **chain: Any) -> SchedulerMixin:
    """A diffusers scheduler of Stable Diffusion's chain.

    Args:
        sampler: `ddim`, or `dpm++`, second-order multistep DPM-Solver++.
        chain: What is to be other than :data:`CHAIN`: any entry of a diffusers scheduler's config.

    Raises :class:`InputError` for another sampler.
    """
    if sampler not in SAMPLERS_OF_STABLE_DIFFUSION:
        raise InputError(argument="sampler", value=sampler, wanted=" or ".join(SAMPLERS_OF_STABLE_DIFFUSION))
    # Trailing: the first step is at the noisiest timestep, where the noise that sampling begins with belongs.
    defaults: Mapping[str, Any] = {
        **CHAIN,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }
    whole = DDIMScheduler.from_config({**defaults, **chain})
    kind = SAMPLERS_OF_STABLE_DIFFUSION[sampler]
    return whole if kind is DDIMScheduler else kind.from_config(whole.config)
