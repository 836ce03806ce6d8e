"""The samplers against data whose best denoiser is known, and guidance by what it asks of the model."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from made.gaussian import MEAN, NULL_CLASS, GaussianData, classes, no_class, sample

from gspn_dit.diffusion import SAMPLERS, create_scheduler, denoise, image_generator, objective_of
from gspn_dit.diffusion.schedulers import shifted
from gspn_dit.errors import InputError


class Counting:
    """Says `conditional` for classes and `unconditional` for none, on every channel; keeps the batch sizes."""

    def __init__(self, channels: int, conditional: float = 3.0, unconditional: float = 1.0) -> None:
        self.channels, self.says, self.batches = channels, (conditional, unconditional), []

    def __call__(self, noisy, timesteps, class_labels):
        self.batches.append(len(noisy))
        values = torch.where(class_labels == NULL_CLASS, self.says[1], self.says[0])
        return values.view(-1, 1, 1, 1).expand(len(noisy), self.channels, *noisy.shape[2:]).clone()


@pytest.mark.parametrize(
    ("objective", "sampler", "steps"),
    [("ddpm", "ddpm", 250), ("ddpm", "ddim", 200), ("ddpm", "dpm++", 30), ("flow", "euler", 100), ("flow", "heun", 12)],
)
def test_every_sampler_recovers_a_gaussian(objective, sampler, steps):
    scheduler = create_scheduler(objective, sampler)
    assert objective_of(scheduler) == objective
    latents = sample(GaussianData(objective), scheduler, steps)
    assert float(latents.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(latents.std()) == pytest.approx(0.5, rel=0.025)


def test_every_sampler_is_tested_above():
    """`sde`, `dopri5` and `edm` in test_samplers.py."""
    assert SAMPLERS == {"ddpm": ("ddpm", "ddim", "dpm++", "edm"), "flow": ("euler", "heun", "sde", "dopri5", "edm")}


@pytest.mark.parametrize(
    "kind", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler, DDPMScheduler]
)
def test_swapped_ddpm_schedulers(kind):
    scheduler = kind.from_config(create_scheduler("ddpm").config)
    latents = sample(GaussianData("ddpm"), scheduler, 100)
    assert float(latents.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(latents.std()) == pytest.approx(0.5, rel=0.05)


def test_swapped_flow_scheduler():
    scheduler = FlowMatchHeunDiscreteScheduler.from_config(create_scheduler("flow").config)
    assert float(sample(GaussianData("flow"), scheduler, 12).std()) == pytest.approx(0.5, rel=0.02)


def test_ddpm_uses_the_learned_variance():
    """Data of unit variance has reverse steps of variance β exactly, at any stride: the range's upper end."""
    upper = sample(GaussianData("ddpm", deviation=1.0, variance=1.0), create_scheduler("ddpm"), 10)
    lower = sample(GaussianData("ddpm", deviation=1.0, variance=-1.0), create_scheduler("ddpm"), 10)
    assert float(upper.std()) == pytest.approx(1.0, rel=0.02)
    assert float(lower.std()) < 0.97


def test_guidance_of_one_costs_one_forward_a_step():
    model = Counting(4)
    denoise(model, create_scheduler("flow"), torch.zeros(3, 4, 2, 2), classes(3), num_inference_steps=5)
    assert model.batches == [3] * 5


def test_guidance_reaches_every_latent_channel():
    model = Counting(4, conditional=3.0, unconditional=1.0)
    noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = denoise(
        model,
        create_scheduler("flow"),
        noise,
        classes(3),
        null_condition=no_class(3),
        num_inference_steps=1,
        guidance_scale=2.5,
    )
    assert model.batches == [6]
    torch.testing.assert_close(latents, noise - (1.0 + 2.5 * (3.0 - 1.0)))  # one Euler step from t = 1 to 0


def test_guidance_leaves_the_variance_conditional():
    class Recording(DDPMScheduler):
        def step(self, model_output, *arguments, **options):
            self.output = model_output
            return super().step(model_output, *arguments, **options)

    scheduler = Recording.from_config(create_scheduler("ddpm").config)
    denoise(
        Counting(8, 0.5, 0.25),
        scheduler,
        torch.zeros(2, 4, 1, 1),
        classes(2),
        null_condition=no_class(2),
        num_inference_steps=2,
        guidance_scale=3.0,
    )
    noise, variance = scheduler.output.chunk(2, dim=1)
    assert noise.unique().tolist() == [0.25 + 3 * 0.25]
    assert variance.unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("objective", "interval", "batches"),
    [
        ("flow", (0.25, 0.85), [2, 4, 4, 4, 2]),  # t = 1, 0.8, 0.6, 0.4, 0.2
        ("flow", (0.0, 1.0), [4, 4, 4, 4, 4]),
        ("ddpm", (0.0, 0.3), [2, 2, 2, 4, 4]),  # t = 999, 749, 500, 250, 0
    ],
)
def test_guidance_interval(objective, interval, batches):
    model = Counting(8 if objective == "ddpm" else 4)
    denoise(
        model,
        create_scheduler(objective),
        torch.zeros(2, 4, 1, 1),
        classes(2),
        null_condition=no_class(2),
        num_inference_steps=5,
        guidance_scale=2.0,
        guidance_interval=interval,
    )
    assert model.batches == batches


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_the_noisiest_step_is_guided_whatever_the_shift(sampler):
    scheduler = create_scheduler("flow", sampler)
    for height, width in ((512, 768), (384, 320), (512, 448)):  # of a model of 256 pixels
        model = Counting(4)
        denoise(
            model,
            shifted(scheduler, math.sqrt(height * width) / 256),
            torch.zeros(1, 4, 1, 1),
            classes(1),
            null_condition=no_class(1),
            num_inference_steps=3,
            guidance_scale=2.0,
        )
        assert set(model.batches) == {2}


@pytest.mark.parametrize(("objective", "sampler"), [(o, s) for o in SAMPLERS for s in SAMPLERS[o]])
def test_an_image_does_not_depend_on_its_batch(objective, sampler):
    def run(images):
        generators = [image_generator(7, i) for i in images]
        noise = torch.stack([torch.randn(4, 2, 2, generator=g) for g in generators])
        return denoise(
            GaussianData(objective),
            create_scheduler(objective, sampler),
            noise,
            classes(len(noise)),
            num_inference_steps=5,
            generator=generators,
        )

    together = run(range(5))
    for i in range(5):
        torch.testing.assert_close(run([i])[0], together[i], rtol=0, atol=1e-6)


def test_a_condition_of_any_names_reaches_the_model_with_its_null_below():
    """Guidance doubles every tensor; options go along as they are."""
    seen = []

    def model(noisy, timesteps, *, encoder_hidden_states, mask, scale):
        seen.append((encoder_hidden_states, mask, scale))
        return torch.zeros_like(noisy)

    text = {"encoder_hidden_states": torch.randn(2, 8, 16), "mask": torch.ones(2, 8, dtype=torch.bool)}
    null = {"encoder_hidden_states": torch.zeros(2, 8, 16), "mask": torch.zeros(2, 8, dtype=torch.bool)}
    given = model, create_scheduler("flow"), torch.zeros(2, 4, 2, 2), text
    options = dict(model_options={"scale": 3.0}, num_inference_steps=1)
    denoise(*given, **options)
    denoise(*given, **options, null_condition=null, guidance_scale=2.0)
    (states, mask, scale), (both_states, both_masks, _) = seen
    assert states is text["encoder_hidden_states"] and mask is text["mask"] and scale == 3.0
    assert torch.equal(both_states, torch.cat([text["encoder_hidden_states"], null["encoder_hidden_states"]]))
    assert torch.equal(both_masks, torch.cat([text["mask"], null["mask"]]))


@pytest.mark.parametrize(
    ("null", "says"),
    [
        (None, r"^guidance_scale=2\.0: null_condition is None; give"),
        (no_class(3), r"^null_condition: shapes \{'class_labels': \(3,\)\}; wanted those of condition"),
        ({"mask": torch.zeros(2)}, r"^null_condition: shapes \{'mask': \(2,\)\}; wanted .*class_labels"),
    ],
)
def test_guidance_without_what_it_leads_away_from_is_refused(null, says):
    model = Counting(4)
    given = model, create_scheduler("flow"), torch.zeros(2, 4, 1, 1), classes(2)
    with pytest.raises(InputError, match=says):
        denoise(*given, null_condition=null, guidance_scale=2.0)
    assert model.batches == []


def test_image_generators_differ_and_repeat():
    def draw(seed, i):
        return torch.randn(4, generator=image_generator(seed, i))

    assert torch.equal(draw(3, 5), draw(3, 5))
    # A torch CPU generator looks at 32 bits of its seed alone.
    seeds = {image_generator(seed, i).initial_seed() % 2**32 for seed in range(4) for i in range(20_000)}
    assert len(seeds) == 80_000
    assert not torch.equal(draw(0, 1), draw(1, 0))
    with pytest.raises(InputError, match="seed=-1"):
        image_generator(-1, 0)


def test_callback_sees_and_replaces_latents():
    steps = []

    def callback(step, timestep, latents, prediction):
        steps.append((step, float(timestep)))
        assert prediction.unique().tolist() == [3.0]
        return torch.full_like(latents, 9.0) if step == 3 else None

    latents = denoise(
        Counting(4),
        create_scheduler("flow"),
        torch.zeros(1, 4, 1, 1),
        classes(1),
        num_inference_steps=4,
        callback=callback,
    )
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    assert [time for _, time in steps] == pytest.approx([1000, 750, 500, 250])
    assert latents.unique().tolist() == [9.0]


@pytest.mark.parametrize(
    ("objective", "sampler", "steps"),
    [
        ("ddpm", "ddpm", 1),
        ("ddpm", "ddpm", 1001),
        ("ddpm", "dpm++", 1000),
        ("ddpm", "ddim", 600),
        ("ddpm", "ddim", 48),
        ("flow", "euler", 0),
    ],
)
def test_steps_that_would_go_wrong_are_refused(objective, sampler, steps):
    model = Counting(4)
    with pytest.raises(InputError, match=f"num_inference_steps={steps}"):
        denoise(
            model,
            create_scheduler(objective, sampler),
            torch.zeros(1, 4, 1, 1),
            classes(1),
            num_inference_steps=steps,
        )
    assert model.batches == []


def test_a_model_of_the_other_objective_is_refused():
    for channels, objective in ((4, "ddpm"), (8, "flow")):
        with pytest.raises(InputError, match=f"is for a {objective} model"):
            denoise(Counting(channels), create_scheduler(objective), torch.zeros(1, 4, 1, 1), classes(1))


def test_unknown_samplers_are_refused():
    with pytest.raises(InputError, match="ddpm, ddim, dpm"):
        create_scheduler("ddpm", "euler")
    with pytest.raises(InputError, match="objective='edm'"):
        create_scheduler("edm")
    with pytest.raises(InputError, match="guidance_interval"):
        denoise(
            Counting(4),
            create_scheduler("flow"),
            torch.zeros(1, 4, 1, 1),
            classes(1),
            guidance_interval=(0.5, 1.5),
        )
