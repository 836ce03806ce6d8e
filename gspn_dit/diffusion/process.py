"""The noising process that a scheduler reverses, x_t = α_t·x + σ_t·ε, and what a network's prediction says of x."""

from __future__ import annotations

import math

import numpy as np
from diffusers import SchedulerMixin
from torch import Tensor

from gspn_dit.errors import InputError


class Process:
    """α and σ at a timestep on the scale 0…1000, and clean latents from a prediction.

    `flow_prediction` is the velocity ε - x of the straight path α = 1 - t, σ = t, told as 1000·t. `epsilon` and
    `v_prediction` are the noise ε and the velocity αε - σx of a chain with α² + σ² = 1; between its steps, log σ/α is
    interpolated linearly.

    Args:
        prediction_type: One of these three.
        alphas_cumprod: ᾱ_t = α_t² of every step of the chain, (T,).

    Raises :class:`InputError` for another prediction type.
    """

    def __init__(self, prediction_type: str, alphas_cumprod: Tensor | None = None) -> None:
        self.prediction_type = prediction_type
        self._ratios: np.ndarray | None = None
        if prediction_type == "flow_prediction":
            return
        if prediction_type not in ("epsilon", "v_prediction") or alphas_cumprod is None:
            raise InputError(
                argument="prediction_type", value=prediction_type, wanted="epsilon, v_prediction or flow_prediction"
            )
        signal = np.clip(alphas_cumprod.double().cpu().numpy(), 1e-12, None)
        self._ratios = np.sqrt((1 - signal) / signal)

    @classmethod
    def of(cls, scheduler: SchedulerMixin) -> Process:
        """That of a diffusers scheduler: a flow's, unless its config names another prediction type."""
        kind = scheduler.config.get("prediction_type", "flow_prediction")
        return cls(kind, getattr(scheduler, "alphas_cumprod", None))

    def levels(self, timestep: float) -> tuple[float, float]:
        """(α, σ) at a timestep."""
        if self._ratios is None:
            return 1 - timestep / 1000, timestep / 1000
        ratio = self.ratio(timestep)
        alpha = 1 / math.sqrt(1 + ratio**2)
        return alpha, ratio * alpha

    def ratio(self, timestep: float) -> float:
        """σ/α at a timestep: EDM's σ (Karras et al., arXiv 2206.00364)."""
        if self._ratios is None:
            return timestep / (1000 - timestep) if timestep < 1000 else math.inf
        return float(np.exp(np.interp(timestep, np.arange(len(self._ratios)), np.log(self._ratios))))

    def timestep(self, ratio: float) -> float:
        """The timestep at which σ/α is a ratio; of a chain, the nearest step, as EDM rounds for networks like ADM's."""
        if self._ratios is None:
            return 1000 * ratio / (1 + ratio)
        return float(np.abs(self._ratios - ratio).argmin())

    def slope(self, timestep: float) -> float:
        """How much the clean latents change with the prediction."""
        alpha, sigma = self.levels(timestep)
        return -sigma / alpha if self.prediction_type == "epsilon" else -sigma

    def clean(self, noisy: Tensor, prediction: Tensor, timestep: float) -> Tensor:
        """The clean latents x that a prediction from noisy ones x_t means."""
        alpha, _ = self.levels(timestep)
        share = {"epsilon": 1 / alpha if alpha else 0.0, "v_prediction": alpha, "flow_prediction": 1.0}
        return share[self.prediction_type] * noisy + self.slope(timestep) * prediction
