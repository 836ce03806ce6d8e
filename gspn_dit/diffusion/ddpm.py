"""The `ddpm` objective: noise prediction with a learned-range variance, as ADM and DiT train it.

Ho et al. 2020 (arXiv 2006.11239) for the chain, Nichol & Dhariwal 2021 (arXiv 2102.09672) for the variance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gspn_dit.diffusion.objective import Batch

NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


class DDPM:
    """Noise prediction over 1000 steps of linear β from 1e-4 to 0.02, with the variance learned between its two bounds.

    The network's output has twice the latents' channels: first the noise ε, then the variance's position v, where -1
    is the lower bound and +1 the upper. Tables are float64, losses float32.
    """

    num_train_timesteps = NUM_TRAIN_TIMESTEPS

    def __init__(self) -> None:
        betas = torch.linspace(BETA_START, BETA_END, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
        signal = torch.cumprod(1 - betas, 0)  # ᾱ_t
        previous = torch.cat([signal.new_ones(1), signal[:-1]])  # ᾱ_{t-1}
        posterior_variance = betas * (1 - previous) / (1 - signal)  # 2006.11239 eq. 7
        # At t = 0 the posterior variance is 0 and has no logarithm: the value at t = 1 stands in.
        posterior_variance = torch.cat([posterior_variance[1:2], posterior_variance[1:]])
        self._tables = {
            "sqrt_signal": signal.sqrt(),
            "sqrt_noise": (1 - signal).sqrt(),
            "mean_of_clean": betas * previous.sqrt() / (1 - signal),  # eq. 7's two coefficients
            "mean_of_noisy": (1 - betas).sqrt() * (1 - previous) / (1 - signal),
            "min_log_variance": posterior_variance.log(),
            "max_log_variance": betas.log(),
        }

    def out_channels(self, latent_channels: int) -> int:
        """Channels the network must return: noise and variance."""
        return 2 * latent_channels

    def times(self, u: Tensor) -> Tensor:
        """Timesteps (B,) long, 0…999, from uniform numbers u (B,) in [0, 1)."""
        return (u.double() * NUM_TRAIN_TIMESTEPS).long()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The hybrid loss of 2102.09672 eq. 16, per sample: (B,) float32.

        It is MSE(ε) + VLB_t with weight 1 on the one term VLB_t in bits per dimension. Times being uniform, E[VLB_t] is
        the whole bound's sum divided by 1000, so this is the paper's λ = 0.001 on the sum; DiT trains with just this.
        The predicted mean is detached in VLB_t, which thus teaches the variance only.

        Args:
            model: Called as model(noisy latents (B,C,h,w), timesteps (B,) float, **condition) -> (B,2C,h,w).
            batch: Its times are :meth:`times` of `u`; its condition is passed on unread.
        """
        clean, noise, times = batch["latents"].float(), batch["noise"].float(), self.times(batch["u"])
        noisy = self.noisy(clean, times, noise)
        predicted, variance = model(noisy, times.float(), **batch["condition"]).float().chunk(2, dim=1)
        mse = (predicted - noise).square().flatten(1).mean(1)
        return mse + self.variational_bound(clean, noisy, times, predicted.detach(), variance)

    def noisy(self, clean: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x + √(1-ᾱ_t) ε (2006.11239 eq. 4)."""
        return self._at("sqrt_signal", times) * clean + self._at("sqrt_noise", times) * noise

    def log_variance(self, variance: Tensor, times: Tensor) -> Tensor:
        """Log Σ between log β̃_t at output -1 and log β_t at output +1 (2102.09672 eq. 15)."""
        share = (variance + 1) / 2
        return share * self._at("max_log_variance", times) + (1 - share) * self._at("min_log_variance", times)

    def variational_bound(
        self, clean: Tensor, noisy: Tensor, times: Tensor, predicted_noise: Tensor, variance: Tensor
    ) -> Tensor:
        """The term of the variational bound at each sample's t, in bits a dimension: (B,).

        KL(q(x_{t-1}|x_t,x_0) ‖ p(x_{t-1}|x_t)) for t > 0, the discretised decoder's -log p(x_0|x_1) at t = 0
        (2006.11239 eq. 5 and 13).
        """
        predicted_clean = (noisy - self._at("sqrt_noise", times) * predicted_noise) / self._at("sqrt_signal", times)
        mean = self._posterior_mean(predicted_clean, noisy, times)
        log_variance = self.log_variance(variance, times)
        true_mean = self._posterior_mean(clean, noisy, times)
        kl = gaussian_kl(true_mean, self._at("min_log_variance", times), mean, log_variance)
        likelihood = discretized_gaussian_log_likelihood(clean, mean, log_variance)
        first = (times == 0).view(-1, 1, 1, 1)
        return torch.where(first, -likelihood, kl).flatten(1).mean(1) / math.log(2)

    def _posterior_mean(self, clean: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (2006.11239 eq. 7)."""
        return self._at("mean_of_clean", times) * clean + self._at("mean_of_noisy", times) * noisy

    def _at(self, name: str, times: Tensor) -> Tensor:
        """A table's float32 entries at the times (B,), shaped (B,1,1,1)."""
        if self._tables[name].device != times.device:
            self._tables[name] = self._tables[name].to(times.device)
        return self._tables[name][times].float().view(-1, 1, 1, 1)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, e^log_variance) ‖ N(other_mean, e^other_log_variance)) in nats, elementwise."""
    gap = other_log_variance - log_variance
    return 0.5 * (gap - 1 + torch.exp(-gap) + (mean - other_mean).square() * torch.exp(-other_log_variance))


def discretized_gaussian_log_likelihood(values: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of a Gaussian's mass in the bin of each value, in nats (2006.11239 eq. 13).

    The 256 bins are 2/255 wide about -1, …, 1 and the outermost two are open: pixels' bins, which ADM and DiT keep for
    latents too. Masses below 1e-12 count as that.
    """
    deviation = torch.exp(0.5 * log_variance)
    above = torch.special.ndtr((values - mean + 1 / 255) / deviation)
    below = torch.special.ndtr((values - mean - 1 / 255) / deviation)
    # The end bins' centres are ±1 and their neighbours' ±(1 - 2/255): 0.999 tells them apart whatever the rounding.
    above = torch.where(values > 0.999, torch.ones_like(above), above)
    below = torch.where(values < -0.999, torch.zeros_like(below), below)
    return (above - below).clamp_min(1e-12).log()
