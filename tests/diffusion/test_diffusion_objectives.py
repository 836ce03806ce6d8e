"""The training objectives against closed forms."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from gspn_dit.diffusion import Batch, create_objective
from gspn_dit.diffusion.ddpm import discretized_gaussian_log_likelihood, gaussian_kl
from gspn_dit.errors import InputError

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SIGNAL = torch.cumprod(1 - BETAS, 0)


def posterior_variance(t: int) -> float:
    """β̃_t of the DDPM paper's eq. 7, t counted from 0."""
    return float(BETAS[t] * (1 - SIGNAL[t - 1]) / (1 - SIGNAL[t]))


def batch(u: torch.Tensor | float = 0.5, n: int = 6) -> Batch:
    """Latents (n,4,3,2) well inside [-1, 1], noise of that shape, labels, and u, one for all or one each."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(n, 4, 3, 2, generator=generator) - 0.5
    noise = torch.randn(n, 4, 3, 2, generator=generator)
    condition = {"class_labels": torch.arange(n) % 3}
    return Batch(latents=latents, noise=noise, u=torch.as_tensor(u).expand(n), condition=condition)


def at(t: int) -> float:
    """A u whose time is step t of the 1000 of ddpm."""
    return (t + 0.5) / 1000


def answers(output: torch.Tensor):
    """A model that always gives this output."""
    return lambda latents, timesteps, class_labels: output


def ddpm_output(noise: torch.Tensor, variance: float) -> torch.Tensor:
    return torch.cat([noise, torch.full_like(noise, variance)], dim=1)


def test_kl_of_gaussians():
    # ln 2 + (1 + 1²) / (2·4) - 1/2, worked by hand for N(0, 1) and N(1, 4)
    kl = gaussian_kl(*map(torch.tensor, (0.0, 0.0, 1.0, math.log(4.0))))
    assert float(kl) == pytest.approx(math.log(2) + 0.25 - 0.5)
    generator = torch.Generator().manual_seed(0)
    m1, v1, m2, v2 = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    expected = kl_divergence(Normal(m1, torch.exp(v1 / 2)), Normal(m2, torch.exp(v2 / 2)))
    torch.testing.assert_close(gaussian_kl(m1, v1, m2, v2), expected)


@pytest.mark.parametrize("mean", [-1.5, -0.2, 0.0, 0.99])
@pytest.mark.parametrize("deviation", [0.01, 0.3, 2.0])
def test_discretised_gaussian_is_a_distribution(mean, deviation):
    bins = torch.linspace(-1, 1, 256)
    log_likelihood = discretized_gaussian_log_likelihood(
        bins, torch.full((256,), mean), torch.full((256,), 2 * math.log(deviation))
    )
    assert float(log_likelihood.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_ddpm_noises_as_the_scheduler_that_samples_it():
    latents, noise = batch()["latents"], batch()["noise"]
    times = torch.tensor([0, 1, 10, 500, 998, 999])
    ours = create_objective("ddpm").noisy(latents, times, noise)
    torch.testing.assert_close(ours, DDPMScheduler().add_noise(latents, noise, times), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [1, 2, 100, 999])
def test_learned_variance_runs_from_posterior_variance_to_beta(t):
    log_variance = create_objective("ddpm").log_variance(torch.tensor([[[[-1.0, 0.0, 1.0]]]]), torch.tensor([t]))
    low, high = math.log(posterior_variance(t)), math.log(BETAS[t])
    assert log_variance.flatten().tolist() == pytest.approx([low, (low + high) / 2, high], rel=1e-5)


@pytest.mark.parametrize("t", [1, 50, 999])
def test_bound_is_zero_for_the_true_posterior_and_known_for_beta(t):
    objective = create_objective("ddpm")
    given = batch(at(t))
    assert objective.times(given["u"]).tolist() == [t] * 6
    noise = given["noise"]
    exact = objective.loss(answers(ddpm_output(noise, -1.0)), given)
    torch.testing.assert_close(exact, torch.zeros(6), atol=1e-4, rtol=0)
    ratio = posterior_variance(t) / float(BETAS[t])
    expected = 0.5 * (ratio - 1 - math.log(ratio)) / math.log(2)  # bits: KL(N(μ, β̃) ‖ N(μ, β))
    wide = objective.loss(answers(ddpm_output(noise, 1.0)), given)
    torch.testing.assert_close(wide, torch.full((6,), expected), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("t", [5, 300, 990])
def test_bound_of_a_wrong_noise_is_the_weighted_error(t):
    """DDPM's eq. 12: with variance σ², the term is β²/(2σ²α(1-ᾱ)) ‖ε - ε̂‖²."""
    given = batch(at(t))
    noise = given["noise"]
    error = 0.1 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    weight = BETAS[t] ** 2 / (2 * posterior_variance(t) * (1 - BETAS[t]) * (1 - SIGNAL[t]))
    mse = error.square().flatten(1).mean(1)
    loss = create_objective("ddpm").loss(answers(ddpm_output(noise + error, -1.0)), given)
    torch.testing.assert_close(loss, mse + float(weight) / math.log(2) * mse, rtol=2e-3, atol=1e-5)


def test_bound_at_the_first_step_is_the_decoders_likelihood():
    given = batch(at(0))
    loss = create_objective("ddpm").loss(answers(ddpm_output(given["noise"], 1.0)), given)
    # The mean is exact, so every value's bin of half-width 1/255 is centred: mass erf(1/255 / (√2 σ)).
    bits = -math.log2(math.erf(1 / 255 / math.sqrt(2 * 1e-4)))
    torch.testing.assert_close(loss, torch.full((6,), bits), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("t", [0, 400])
def test_bound_teaches_the_variance_alone(t):
    given = batch(at(t))
    noise = given["noise"]
    output = torch.randn(6, 8, 3, 2, generator=torch.Generator().manual_seed(2)).mul(0.1).requires_grad_()
    create_objective("ddpm").loss(answers(output), given).sum().backward()
    mean_gradient, variance_gradient = output.grad.chunk(2, dim=1)
    mse_gradient = 2 * (output.detach()[:, :4] - noise) / noise[0].numel()
    torch.testing.assert_close(mean_gradient, mse_gradient)
    assert (variance_gradient != 0).any()


def test_ddpm_times_are_even():
    times = create_objective("ddpm").times((torch.arange(5000) + 0.5) / 5000)
    assert times.bincount().tolist() == [5] * 1000
    assert create_objective("ddpm").times(torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 999]


def test_flow_velocity_is_the_paths_derivative():
    objective, seen = create_objective("flow"), []

    def model(noisy, timesteps, class_labels):
        seen.append((noisy, timesteps))
        return torch.zeros_like(noisy)

    times = torch.linspace(0, 0.9, 6)
    given = batch(times)
    latents = given["latents"]
    loss = objective.loss(model, given)
    objective.loss(model, batch(times + 0.1))
    derivative = (seen[1][0] - seen[0][0]) / 0.1
    torch.testing.assert_close(seen[0][0][0], latents[0])  # t = 0 is the data
    torch.testing.assert_close(seen[0][1], 1000 * times)
    torch.testing.assert_close(loss, derivative.square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)
    perfect = objective.loss(answers(derivative), given)
    torch.testing.assert_close(perfect, torch.zeros(6), atol=1e-9, rtol=0)


def test_flow_times():
    u = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24])
    torch.testing.assert_close(create_objective("flow").times(u), u)
    quantiles = torch.tensor([0.0227501, 0.1586553, 0.5, 0.8413447])  # Φ(-2), Φ(-1), Φ(0), Φ(1)
    times = create_objective("flow", time_sampling="logit-normal").times(quantiles)
    torch.testing.assert_close(times, torch.tensor([-2.0, -1.0, 0.0, 1.0]).sigmoid(), rtol=1e-4, atol=1e-6)
    assert create_objective("flow", time_sampling="logit-normal").times(u).isfinite().all()


@pytest.mark.parametrize("name", ["ddpm", "flow"])
def test_a_samples_loss_is_its_own_and_float32(name):
    objective = create_objective(name)
    assert objective.num_train_timesteps == 1000
    model = torch.nn.Conv2d(4, objective.out_channels(4), 1)
    given = batch(torch.linspace(0, 0.99, 6))
    given["latents"] = given["latents"].bfloat16()

    def loss(rows):
        condition = {"class_labels": given["condition"]["class_labels"][rows]}
        some = {name: given[name][rows] for name in ("latents", "noise", "u")}
        return objective.loss(lambda x, t, class_labels: model(x), Batch(**some, condition=condition))

    together = loss(slice(None))
    assert together.shape == (6,)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together[2:3], loss(slice(2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "flow"])
def test_a_condition_reaches_the_model_unread(name):
    """Whatever its names and shapes are, they are the model's arguments."""
    objective, seen = create_objective(name), {}

    def model(noisy, timesteps, **condition):
        seen.update(condition)
        return torch.zeros(6, objective.out_channels(4), 3, 2)

    given = batch()
    given["condition"] = {"encoder_hidden_states": torch.randn(6, 8, 16), "mask": torch.ones(6, 8, dtype=torch.bool)}
    objective.loss(model, given)
    assert seen.keys() == given["condition"].keys()
    assert all(seen[key] is given["condition"][key] for key in seen)


def test_unknown_objectives_are_named():
    with pytest.raises(InputError, match="objective='edm'"):
        create_objective("edm")
    for name, times in (("flow", "cosine"), ("ddpm", "logit-normal")):
        with pytest.raises(InputError, match=f"time_sampling='{times}'"):
            create_objective(name, time_sampling=times)
