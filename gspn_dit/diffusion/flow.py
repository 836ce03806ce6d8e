"""The `flow` objective: the velocity of the straight path from data to noise, as SiT and SD3 train it.

Lipman et al. 2022 (arXiv 2210.02747), Ma et al. 2024 (SiT, arXiv 2401.08740), Esser et al. 2024 (SD3, 2403.03206).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gspn_dit.diffusion.objective import Batch
from gspn_dit.errors import InputError


class Flow:
    """Velocity prediction on x_t = (1-t)·x + t·ε, t = 0 data and t = 1 noise; the network is told 1000·t.

    Args:
        time_sampling: `uniform` times, or `logit-normal`: t = sigmoid(z), z standard normal (SD3 with m=0, s=1).
    """

    num_train_timesteps = 1000

    def __init__(self, time_sampling: Literal["uniform", "logit-normal"] = "uniform") -> None:
        if time_sampling not in ("uniform", "logit-normal"):
            raise InputError(argument="time_sampling", value=time_sampling, wanted="'uniform' or 'logit-normal'")
        self.time_sampling = time_sampling

    def out_channels(self, latent_channels: int) -> int:
        """Channels the network must return: the velocity's."""
        return latent_channels

    def times(self, u: Tensor) -> Tensor:
        """Times (B,) float32 in [0, 1) from uniform numbers u (B,) in [0, 1)."""
        u = u.float()
        return u if self.time_sampling == "uniform" else torch.sigmoid(torch.special.ndtri(u))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error of the velocity dx_t/dt = ε - x, per sample: (B,) float32 (2401.08740, 2403.03206).

        Args:
            model: Called as model(noisy latents (B,C,h,w), timesteps 1000·t (B,), **condition) -> (B,C,h,w).
            batch: Its times t are :meth:`times` of `u`; its condition is passed on unread.
        """
        clean, noise, times = batch["latents"].float(), batch["noise"].float(), self.times(batch["u"])
        t = times.view(-1, 1, 1, 1)
        noisy = (1 - t) * clean + t * noise
        velocity = model(noisy, times * self.num_train_timesteps, **batch["condition"]).float()
        return (velocity - (noise - clean)).square().flatten(1).mean(1)
