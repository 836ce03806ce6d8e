"""Data whose best denoiser is known, and how samplers are run on it."""

import torch

from gspn_dit.diffusion import denoise

SIGNAL = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
MEAN = 1.5
NULL_CLASS = 10


class GaussianData:
    """The best denoiser of data drawn from N(1.5, deviation²), with a given place in the learned variance's range."""

    def __init__(self, objective: str, deviation: float = 0.5, variance: float = 1.0) -> None:
        self.objective, self.deviation, self.variance = objective, deviation, variance

    def __call__(self, noisy, timesteps, class_labels):
        t = timesteps.view(-1, 1, 1, 1) / 1000
        signal, noise_level = 1 - t, t
        if self.objective == "ddpm":
            signal = SIGNAL[timesteps.round().long()].sqrt().view(-1, 1, 1, 1)
            noise_level = (1 - signal**2).sqrt()
        centred = (noisy - signal * MEAN) / (self.deviation**2 * signal**2 + noise_level**2)
        clean, noise = MEAN + self.deviation**2 * signal * centred, noise_level * centred
        if self.objective == "flow":
            return noise - clean
        return torch.cat([noise, torch.full_like(noise, self.variance)], dim=1)


def classes(n: int) -> dict[str, torch.Tensor]:
    """n images of the first class."""
    return {"class_labels": torch.zeros(n, dtype=torch.long)}


def no_class(n: int) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.full((n,), NULL_CLASS)}


def standard_noise(n: int = 2048) -> torch.Tensor:
    """(n,4,1,1) of mean 0 and deviation 1 exactly."""
    noise = torch.randn(n, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    return (noise - noise.mean()) / noise.std()


def sample(model, scheduler, steps, n=2048):
    return denoise(
        model,
        scheduler,
        standard_noise(n),
        classes(n),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(1),
    )
