"""Stable Diffusion's objective: diffusers' own arithmetic, and losses that mean what they say."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from gspn_dit.diffusion.stable_diffusion import CHAIN, StableDiffusion, stable_diffusion_scheduler
from gspn_dit.errors import InputError

KINDS = ("epsilon", "v_prediction")


def made(batch=6):
    generator = torch.Generator().manual_seed(0)
    clean, noise, other = torch.randn(3, batch, 4, 5, 7, generator=generator)
    return clean, noise, other, torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(**CHAIN),
        DDIMScheduler(**CHAIN, rescale_betas_zero_snr=True),
        DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2"),
    ],
    ids=["sd", "zero-snr", "cosine"],
)
def test_noise_and_targets_are_those_of_diffusers_to_the_last_bit(scheduler, kind):
    scheduler.register_to_config(prediction_type=kind)
    objective = StableDiffusion.of(scheduler)
    clean, noise, _, times = made()
    assert torch.equal(objective.noisy(clean, times, noise), scheduler.add_noise(clean, noise, times))
    target = noise if kind == "epsilon" else scheduler.get_velocity(clean, noise, times)
    assert torch.equal(objective.target(clean, times, noise), target)


def test_the_chain_is_that_of_stable_diffusion_whatever_the_sampler():
    signal = [StableDiffusion.of(stable_diffusion_scheduler(name)).alphas_cumprod for name in ("ddim", "dpm++")]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    for found in signal:
        torch.testing.assert_close(found.double(), torch.cumprod(1 - betas, 0), rtol=1e-4, atol=0)
    other = stable_diffusion_scheduler("dpm++", prediction_type="v_prediction", num_train_timesteps=50)
    objective = StableDiffusion.of(other)
    assert (objective.num_train_timesteps, objective.prediction_type) == (50, "v_prediction")


def test_sampling_begins_at_the_noisiest_step():
    for name in ("ddim", "dpm++"):
        scheduler = stable_diffusion_scheduler(name)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[0] == 999


def test_times_are_spread_over_the_whole_chain():
    objective = StableDiffusion.of(EulerDiscreteScheduler(**CHAIN))
    u = (torch.arange(4000) + 0.5) / 4000
    assert torch.equal(objective.times(u).bincount(), torch.full((1000,), 4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_error_of_the_prediction(kind):
    objective = StableDiffusion.of(stable_diffusion_scheduler(prediction_type=kind))
    clean, noise, _, times = made()
    batch = {"latents": clean, "noise": noise, "u": (times + 0.5) / 1000, "condition": {"words": torch.ones(6)}}
    target, seen = objective.target(clean, times, noise), {}

    def model(latents, timesteps, words):
        seen.update(latents=latents, timesteps=timesteps, words=words)
        return target + torch.arange(6.0).view(-1, 1, 1, 1)

    torch.testing.assert_close(objective.loss(model, batch), torch.arange(6.0) ** 2)
    assert torch.equal(seen["timesteps"], times) and torch.equal(seen["words"], torch.ones(6))
    assert torch.equal(seen["latents"], objective.noisy(clean, times, noise))


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_of_clean_latents(kind):
    """Whatever is predicted: min(SNR, γ) times the squared error of the latents that follow from it."""
    objective = StableDiffusion.of(stable_diffusion_scheduler(prediction_type=kind), min_snr_gamma=5.0)
    clean, noise, error, times = made()
    signal = objective.alphas_cumprod.double()[times].view(-1, 1, 1, 1)
    implied = clean + error  # the latents that the prediction implies, of the same noisy ones
    implied_noise = noise - (signal / (1 - signal)).sqrt() * error
    predicted = {
        "epsilon": implied_noise,
        "v_prediction": signal.sqrt() * implied_noise - (1 - signal).sqrt() * implied,
    }[kind].float()
    batch = {"latents": clean, "noise": noise, "u": (times + 0.5) / 1000, "condition": {}}
    loss = objective.loss(lambda latents, timesteps: predicted, batch)
    snr = (signal / (1 - signal)).flatten()
    wanted = snr.clamp(max=5.0) * error.double().square().flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-3, atol=1e-6)


def test_what_there_is_not_is_refused():
    with pytest.raises(InputError, match=r"^prediction_type='sample': wanted epsilon or v_prediction"):
        StableDiffusion.of(DDPMScheduler(prediction_type="sample"))
    for scheduler in (EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(InputError, match=rf"^scheduler: a {type(scheduler).__name__} describes no chain"):
            StableDiffusion.of(scheduler)
    with pytest.raises(InputError, match=r"^sampler='heun': wanted ddim or dpm\+\+"):
        stable_diffusion_scheduler("heun")
