"""SiT's SDE, dopri5, EDM's sampler, and diffusers' schedulers by name, against data whose best denoiser is known."""

import inspect
import math
import re
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from made.gaussian import MEAN, GaussianData, classes, sample, standard_noise

from gspn_dit.diffusion import create_scheduler, denoise, image_generator
from gspn_dit.diffusion.edm import EDMHeunScheduler
from gspn_dit.diffusion.process import Process
from gspn_dit.diffusion.sampling import check_steps
from gspn_dit.diffusion.schedulers import shifted, with_options
from gspn_dit.diffusion.sde import DIFFUSION_FORMS, LAST_STEPS, FlowMatchSDEScheduler
from gspn_dit.errors import InputError


def integrated(scheduler, steps, noise=None, **options):
    """Latents of Gaussian data of the flow, from a few noises."""
    noise = standard_noise(8) if noise is None else noise
    model = GaussianData("flow")
    return denoise(model, scheduler, noise, classes(len(noise)), num_inference_steps=steps, **options)


def exact(noise, deviation=0.5):
    """Where the flow's ODE takes noise: each step keeps a sample's place in the Gaussian."""
    return MEAN + deviation * noise


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize(("method", "steps"), [("euler", 250), ("heun", 60)])
def test_the_sde_keeps_the_distribution_whatever_its_diffusion(form, method, steps):
    options = {"diffusion_form": form, "sampling_method": method, "last_step": "tweedie"}
    latents = sample(GaussianData("flow"), create_scheduler("flow", "sde", options), steps)
    assert float(latents.mean()) == pytest.approx(MEAN, abs=0.04)
    assert float(latents.std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("last", LAST_STEPS)
def test_every_last_step_ends_at_the_data(last):
    latents = sample(GaussianData("flow"), create_scheduler("flow", "sde", {"last_step": last}), 250)
    assert float(latents.mean()) == pytest.approx(MEAN, abs=0.04)
    assert float(latents.std()) == pytest.approx(0.5, rel=0.06)


def test_a_diffusion_is_what_is_published():
    """SiT's table in our time: t = 1 is noise."""
    d = {form: FlowMatchSDEScheduler(diffusion_form=form, diffusion_norm=1.0).diffusion for form in DIFFUSION_FORMS}
    assert [d["constant"](t) for t in (0, 0.5, 1)] == [1, 1, 1]
    assert d["sigma"](0.25) == d["linear"](0.25) == 0.25
    assert d["sbdm"](0.75) == pytest.approx(3)  # σσ̇ - σ²α̇/α
    assert [d["decreasing"](t) for t in (0, 0.5, 1)] == pytest.approx([0, 0.25, 1])
    assert [d["increasing-decreasing"](t) for t in (0, 0.5, 1)] == pytest.approx([0, 1, 0])


def test_last_steps_are_their_formulas():
    """From one step alone: the whole way from noise is the last step, and the velocity there is known."""
    noise, t = standard_noise(4), 0.6
    model = GaussianData("flow")
    velocity = model(noise, torch.full((4,), 1000 * t), None)
    for last, expected in (
        ("euler", noise - t * velocity),
        ("tweedie", noise - t * velocity),  # the mean of x given x_t: x_t - t·v on the straight path
        ("mean", noise - t * (velocity + t * ((1 - t) * velocity + noise) / t)),
    ):
        latents = integrated(FlowMatchSDEScheduler(last_step=last), 1, noise, sigmas=[t])
        torch.testing.assert_close(latents, expected)


def test_without_diffusion_the_sde_is_the_ode():
    """Euler-Maruyama is Euler then, and Heun's is Heun's, of second order."""
    still = {"diffusion_form": "constant", "diffusion_norm": 0.0, "last_step": "none"}
    torch.testing.assert_close(
        integrated(create_scheduler("flow", "sde", still), 10), integrated(create_scheduler("flow", "euler"), 10)
    )
    noise = standard_noise(8)
    errors = [
        float((integrated(FlowMatchSDEScheduler(**still, sampling_method="heun"), n) - exact(noise)).abs().max())
        for n in (20, 40)
    ]
    assert 1.6 < math.log2(errors[0] / errors[1]) < 2.6


def test_the_shift_moves_the_sdes_levels():
    plain = create_scheduler("flow", "sde")
    moved = shifted(plain, 3.0)
    plain.set_timesteps(5), moved.set_timesteps(5)
    assert moved.sigmas.tolist() == pytest.approx([3 * t / (1 + 2 * t) for t in plain.sigmas])


def test_dopri5_is_as_exact_as_its_tolerance():
    noise = standard_noise(6)
    for tolerance, error in ((1e-3, 0.05), (1e-6, 1e-4)):
        scheduler = create_scheduler("flow", "dopri5", {"rtol": tolerance, "atol": tolerance / 10})
        assert float((integrated(scheduler, 1, noise) - exact(noise)).abs().max()) < error


def test_edms_sampler_is_of_second_order():
    noise, errors = standard_noise(8), []
    for steps in (20, 40):
        latents = integrated(create_scheduler("flow", "edm", {"sigma_min": 1e-4, "sigma_max": 1e4}), steps, noise)
        errors.append(float((latents - exact(noise)).abs().max()))
    assert 1.5 < math.log2(errors[0] / errors[1]) < 2.8


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
@pytest.mark.parametrize("churn", [{}, {"S_churn": 8.0, "S_tmin": 0.05, "S_tmax": 50.0}])
def test_edms_sampler_recovers_a_gaussian(objective, churn):
    latents = sample(GaussianData(objective), create_scheduler(objective, "edm", churn), 80)
    assert float(latents.mean()) == pytest.approx(MEAN, abs=0.04)
    assert float(latents.std()) == pytest.approx(0.5, rel=0.04)


def test_without_churn_edms_sampler_is_the_deterministic_heun():
    """That of diffusers, from the same timesteps of the chain."""
    noise, steps = standard_noise(4), [999, 900, 700, 400, 150, 30, 0]
    heun = HeunDiscreteScheduler.from_config(create_scheduler("ddpm").config)
    edm = create_scheduler("ddpm", "edm", {"S_churn": 0.0})
    ours = denoise(GaussianData("ddpm"), edm, noise, classes(4), sigmas=[edm.process.ratio(t) for t in steps])
    theirs = denoise(GaussianData("ddpm"), heun, noise, classes(4), timesteps=steps)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_churn_is_what_is_published():
    scheduler = EDMHeunScheduler(S_churn=40.0, S_tmin=0.05, S_tmax=50.0, prediction_type="flow_prediction")
    scheduler.set_timesteps(256)
    assert scheduler.churn(1.0) == 40 / 256 and scheduler.churn(0.04) == scheduler.churn(60.0) == 0
    scheduler.set_timesteps(18)
    assert scheduler.churn(1.0) == math.sqrt(2) - 1
    assert (scheduler.sigmas[0], scheduler.sigmas[-1]) == pytest.approx((80, 0.002))
    ramp = [sigma ** (1 / 7) for sigma in scheduler.sigmas]  # even steps of the seventh root, eq. 5
    assert [a - b for a, b in pairwise(ramp)] == pytest.approx([ramp[0] - ramp[1]] * 17)


@pytest.mark.parametrize(
    ("objective", "sampler", "options"),
    [
        ("flow", "sde", {}),
        ("flow", "sde", {"sampling_method": "heun"}),
        ("flow", "dopri5", {}),
        ("flow", "edm", {"S_churn": 4.0}),
        ("ddpm", "edm", {"S_churn": 4.0}),
        ("ddpm", "EulerAncestralDiscreteScheduler", {}),
        ("ddpm", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_an_image_does_not_depend_on_its_batch(objective, sampler, options):
    def run(images):
        generators = [image_generator(7, i) for i in images]
        noise = torch.stack([torch.randn(4, 2, 2, generator=g) for g in generators])
        scheduler = create_scheduler(objective, sampler, options)
        given = GaussianData(objective), scheduler, noise, classes(len(noise))
        return denoise(*given, num_inference_steps=5, generator=generators)

    together = run(range(4))
    for i in range(4):
        torch.testing.assert_close(run([i])[0], together[i], rtol=0, atol=1e-6)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("objective", "name", "options"),
    [
        ("ddpm", "UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("ddpm", "EulerAncestralDiscreteScheduler", {}),
        ("ddpm", "DEISMultistepScheduler", {"solver_order": 3}),
        ("ddpm", "PNDMScheduler", {}),
        ("ddpm", "LMSDiscreteScheduler", {}),
        ("flow", "UniPCMultistepScheduler", {"flow_shift": 2.0}),
        ("flow", "DPMSolverMultistepScheduler", {}),
        ("flow", "FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ],
)
def test_a_scheduler_by_name_draws_what_a_loop_of_diffusers_draws(objective, name, options):
    """To the bit: the class made from the model's config, its set_timesteps and its step."""
    model, noise, steps = GaussianData(objective), standard_noise(4), 6
    kind = getattr(diffusers, name)
    if objective == "ddpm":
        theirs = kind.from_config(create_scheduler("ddpm").config, variance_type=None, **options)
    else:
        flow = {} if "Flow" in name else {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        theirs = kind(**flow, **options)
    with_levels = objective == "flow" and "sigmas" in inspect.signature(theirs.set_timesteps).parameters
    theirs.set_timesteps(steps, **({"sigmas": np.linspace(1, 1 / steps, steps)} if with_levels else {}))
    latents = noise * getattr(theirs, "init_noise_sigma", 1.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for t in theirs.timesteps:
            scaled = theirs.scale_model_input(latents, t) if hasattr(theirs, "scale_model_input") else latents
            prediction = model(scaled, t.float().expand(4), None)[:, :4]
            drawn = {"generator": generator} if "Ancestral" in name else {}
            latents = theirs.step(prediction, t, latents, **drawn).prev_sample
    ours = create_scheduler(objective, name, options)
    found = denoise(
        model, ours, noise, classes(4), num_inference_steps=steps, generator=torch.Generator().manual_seed(3)
    )
    assert type(ours) is type(theirs)
    assert torch.equal(found, latents)


def test_a_schedulers_chain_and_prediction_go_on_in_another():
    own = create_scheduler("ddpm")
    trained = type(own).from_config(own.config, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    for sampler in ("ddim", "edm", "UniPCMultistepScheduler"):
        made = create_scheduler("ddpm", sampler, like=trained).config
        assert (made["prediction_type"], made["beta_schedule"]) == ("v_prediction", "squaredcos_cap_v2")


@pytest.mark.parametrize(
    ("objective", "sampler", "options", "says"),
    [
        ("flow", "UniPCMultistepSchedular", {}, "did you mean UniPCMultistepScheduler"),
        ("flow", "plms", {}, r"^sampler='plms': the flow objective is sampled with euler, heun, sde"),
        ("ddpm", "sde", {}, "the ddpm objective is sampled with ddpm, ddim"),
        ("flow", "LMSDiscreteScheduler", {}, "does not integrate a flow"),
        ("ddpm", "FlowMatchEulerDiscreteScheduler", {}, "no chain of noise"),
        ("ddpm", "EDMEulerScheduler", {}, "no chain of noise"),
        ("ddpm", "DDIMInverseScheduler", {}, "does not go from noise to images"),
        ("ddpm", "RePaintScheduler", {}, "does not go from noise to images"),
        ("ddpm", "dpm++", {"use_karras_sigma": True}, r"no use_karras_sigma; did you mean use_karras_sigmas\?"),
        ("ddpm", "dpm++", {"beta_end": 1.0}, "training has fixed beta_end"),
        ("ddpm", "dpm++", {"algorithm_type": "best"}, r"^scheduler_options=.*DPMSolverMultistepScheduler says: best"),
        ("flow", "sde", {"diffusion_form": "sigmoid"}, "diffusion_form='sigmoid': wanted one of constant, sbdm"),
        ("flow", "sde", {"last_step_size": 1.5}, "last_step_size=1.5: wanted a time between 0 and 1"),
        ("flow", "edm", {"S_churn": -1}, "S_churn=-1: wanted 0 or more"),
        ("flow", "dopri5", {"rtol": 0}, "rtol=0: wanted a positive number"),
        ("ddpm", "ScoreSdeVeScheduler", {}, "it has no step"),
        ("flow", "HeliosScheduler", {}, "a pyramid of resolutions"),
        ("flow", "HeliosDMDScheduler", {}, "a pyramid of resolutions"),
        ("ddpm", "CogVideoXDDIMScheduler", {}, "reverses a chain of noise that is not the model's"),
        ("ddpm", "DDPMParallelScheduler", {}, "leaves out the variance .* DDPMScheduler does the same"),
        ("flow", "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "training has fixed invert_sigmas"),
        ("flow", "euler", {"use_dynamic_shifting": True}, "use_dynamic_shifting: nothing says by how much"),
        ("flow", "UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0: .* does not integrate a flow"),
        ("ddpm", "dpm++", {"variance_type": "learned_range"}, "leaves out the learned variance"),
        ("ddpm", "edm", {"sigma_min": 500.0, "sigma_max": 600.0}, "the chain's σ go from 0.01 to 157"),
    ],
)
def test_samplers_and_options_that_cannot_be_are_refused(objective, sampler, options, says):
    with pytest.raises(InputError, match=says) as error:
        create_scheduler(objective, sampler, options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("name", ["UniPC", "DPMSolver", "DEIS"])
def test_levels_that_are_no_flows_are_refused(name, option):
    """Of these classes diffusers flips falling σ of a flow, or takes the logarithm of a negative one."""
    sampler = f"{name}MultistepScheduler"
    with pytest.raises(InputError, match=f"^scheduler_options=.*: {option}: {sampler} makes no levels of a flow"):
        create_scheduler("flow", sampler, {option: True})
    own = create_scheduler("flow", sampler)
    with pytest.raises(InputError, match=f"^scheduler_options=.*{option}"):
        with_options(own, {option: True})
    with pytest.raises(InputError, match=f"^scheduler='{sampler}': {option}: "):  # one that somebody else has made
        integrated(type(own).from_config(own.config, **{option: True}), 5)


@pytest.mark.parametrize(
    ("objective", "sampler", "options"),
    [
        ("ddpm", "ddpm", {"variance_type": "fixed_small", "clip_sample": True}),
        ("ddpm", "ddim", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("ddpm", "dpm++", {"thresholding": True, "solver_order": 3, "use_karras_sigmas": True}),
        ("ddpm", "edm", {"S_churn": 3.0, "rho": 5.0}),
        ("flow", "euler", {"shift": 3.0, "stochastic_sampling": True}),
        ("flow", "sde", {"diffusion_form": "sbdm", "last_step": "tweedie", "shift": 2.0}),
        ("flow", "dopri5", {"rtol": 0.5, "atol": 0.25}),
        ("flow", "UniPCMultistepScheduler", {"flow_shift": 2.0, "solver_order": 1}),
    ],
)
def test_every_option_that_is_given_is_in_the_config(objective, sampler, options):
    """Also an option that the scheduler before had at its default, which diffusers notes, and then drops."""
    made = create_scheduler(objective, sampler, options)
    changed = with_options(create_scheduler(objective, sampler), options)
    again = with_options(changed, options)
    for scheduler in (made, changed, again):
        assert {name: scheduler.config[name] for name in options} == options


def test_the_samplers_of_the_documents_commands_reach_the_data():
    page = (Path(__file__).parents[2] / "docs/sampling.md").read_text()
    commands = re.findall(r"--model digits --sampler (\S+) --scheduler-options (\S+)", page)  # a model of the flow
    assert len(commands) >= 2
    for sampler, words in commands:
        options = dict(word.split("=") for word in words.split(","))
        options = {name: int(value) if value.isdigit() else value for name, value in options.items()}
        latents = sample(GaussianData("flow"), create_scheduler("flow", sampler, options), 50, n=512)
        assert float(latents.mean()) == pytest.approx(MEAN, abs=0.1)
        assert float(latents.std()) == pytest.approx(0.5, rel=0.15)


def test_dopri5_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("gspn_dit.extras._is_here", lambda module: module != "torchdiffeq")
    with pytest.raises(InputError, match=r'^torchdiffeq is not installed; `pip install "gspn-dit\[ode\]"` brings it$'):
        create_scheduler("flow", "dopri5")


@pytest.mark.parametrize(
    ("sampler", "given", "asked"),
    [
        ("euler", {"sigmas": [1.0, 0.6, 0.1]}, [1000, 600, 100]),
        ("euler", {"timesteps": [1000, 500]}, [1000, 500]),
        ("sde", {"sigmas": torch.tensor([1.0, 0.5])}, [1000, 500]),
        ("UniPCMultistepScheduler", {"sigmas": [1.0, 0.5]}, [1000, 500]),
        ("FlowMatchLCMScheduler", {"timesteps": [1000, 500]}, [1000, 500]),
        ("EulerDiscreteScheduler", {"sigmas": [7.0, 2.0, 0.5]}, "the chain's"),
        ("edm", {"sigmas": [7.0, 2.0, 0.5]}, "the chain's, twice but for the last"),
    ],
)
def test_levels_that_are_given_are_where_the_network_is_asked(sampler, given, asked):
    objective = "ddpm" if isinstance(asked, str) else "flow"
    seen, model = [], GaussianData(objective)
    if objective == "ddpm":
        steps = [Process.of(create_scheduler("ddpm")).timestep(sigma) for sigma in given["sigmas"]]
        asked = [steps[0], steps[1], steps[1], steps[2], steps[2]] if "twice" in asked else steps

    def network(noisy, timesteps, class_labels):
        seen.append(float(timesteps[0]))
        return model(noisy, timesteps, class_labels)

    denoise(network, create_scheduler(objective, sampler), standard_noise(2), classes(2), **given)
    assert seen == pytest.approx(asked, abs=1)


@pytest.mark.parametrize(
    ("sampler", "given", "says"),
    [
        ("euler", {"sigmas": [1.0], "timesteps": [1000]}, "only one of timesteps and sigmas"),
        ("heun", {"sigmas": [1.0, 0.5]}, r"^sigmas=.*FlowMatchHeunDiscreteScheduler takes none"),
        ("dopri5", {"sigmas": [1.0, 0.5]}, "FlowMatchDopri5Scheduler takes none"),
        ("euler", {"sigmas": [0.5, 1.0]}, "wanted numbers that fall from at most 1"),
        ("euler", {"sigmas": [1.0, 0.0]}, "wanted numbers that fall"),
        ("euler", {"timesteps": []}, r"^timesteps=\[\]"),
        ("sde", {"sigmas": [1.5, math.nan]}, "sigmas="),
        ("DPMSolverSinglestepScheduler", {"timesteps": [900, 400]}, "takes none of a flow"),
        ("DPMSolverMultistepScheduler", {"timesteps": [900, 400]}, "takes none of a flow"),
    ],
)
def test_levels_that_cannot_be_are_refused(sampler, given, says):
    with pytest.raises(InputError, match=says):
        integrated(create_scheduler("flow", sampler), 5, **given)


@pytest.mark.parametrize("options", [{"shift": 3.0}, {"use_karras_sigmas": True}])
def test_timesteps_that_would_not_be_those_of_the_noise_are_refused(options):
    scheduler = create_scheduler("flow", "euler", options)
    with pytest.raises(InputError, match=r"^timesteps=\[900, 400, 100\]: the shift or spacing of FlowMatchEuler"):
        integrated(scheduler, 5, timesteps=[900, 400, 100])
    assert integrated(scheduler, 5, sigmas=[0.9, 0.4, 0.1]).isfinite().all()


@pytest.mark.parametrize(
    ("objective", "sampler", "options", "steps", "says"),
    [
        ("ddpm", "LCMScheduler", {}, 60, "LCMScheduler says: "),
        ("ddpm", "TCDScheduler", {}, 60, "TCDScheduler says: "),
        ("flow", "sde", {}, 1, "wanted 2 or more with last_step mean"),
        ("ddpm", "dpm++", {}, 1000, "DPMSolverMultistepScheduler"),
    ],
)
def test_steps_that_a_scheduler_does_not_take_are_refused_before_any_forward(objective, sampler, options, steps, says):
    scheduler = create_scheduler(objective, sampler, options)
    before = list(scheduler.timesteps)
    with pytest.raises(InputError, match=f"^num_inference_steps={steps}: .*{says}|{says}.*num_inference_steps"):
        check_steps(scheduler, steps)
    check_steps(scheduler, 4)
    assert list(scheduler.timesteps) == before
    with pytest.raises(InputError, match="num_inference_steps"):
        integrated(scheduler, steps)


@pytest.mark.parametrize("sampler", ["euler", "sde", "dopri5", "edm"])
def test_a_callback_gets_the_timestep_as_a_tensor_whoever_integrates(sampler):
    seen = []
    scheduler = create_scheduler("flow", sampler)
    integrated(scheduler, 3, callback=lambda step, timestep, latents, prediction: seen.append(timestep))
    assert all(isinstance(each, torch.Tensor) and each.shape == () for each in seen)
    assert seen == list(scheduler.timesteps)


def test_a_process_finds_the_clean_latents_of_every_prediction():
    clean, noise = torch.randn(2, 3, 4, 4, 4).unbind()
    chain = create_scheduler("ddpm").alphas_cumprod
    for kind, t in (("epsilon", 300.0), ("v_prediction", 300.0), ("flow_prediction", 300.0)):
        process = Process(kind, chain)
        alpha, sigma = process.levels(t)
        noisy = alpha * clean + sigma * noise
        prediction = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "flow_prediction": noise - clean}
        torch.testing.assert_close(process.clean(noisy, prediction[kind], t), clean)
        moved = process.clean(noisy, prediction[kind] + 1, t) - clean
        torch.testing.assert_close(moved, torch.full_like(clean, process.slope(t)))
        assert process.timestep(process.ratio(t)) == pytest.approx(t)
    with pytest.raises(InputError, match="prediction_type='sample'"):
        Process("sample", chain)
