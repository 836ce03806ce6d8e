"""Guidance: its schedules, rescaling, adaptive projection, and a guide, by what each leaves and changes."""

import math

import pytest
import torch
from made.gaussian import NULL_CLASS, GaussianData, classes, no_class, standard_noise

from gspn_dit.diffusion import create_scheduler, denoise
from gspn_dit.diffusion.guiding import Guider, decompose, rescale
from gspn_dit.diffusion.process import Process
from gspn_dit.errors import InputError
from gspn_dit.guidance import Guidance

FLOW = Process("flow_prediction")


class ClassData:
    """Gaussian data whose mean moves with the class, and by half of that where there is none."""

    def __init__(self, objective="flow", shift=1.0):
        self.data, self.shift = GaussianData(objective), shift

    def __call__(self, noisy, timesteps, class_labels):
        away = torch.where(class_labels == NULL_CLASS, 0.5, 1.0).view(-1, 1, 1, 1) * self.shift
        output = self.data(noisy, timesteps, class_labels)
        return output + away * torch.linspace(-1, 1, output.shape[1]).view(1, -1, 1, 1)


def drawn(model=None, objective="flow", sampler=None, guide=None, **guidance):
    noise = standard_noise(5)
    return denoise(
        model or ClassData(objective),
        create_scheduler(objective, sampler),
        noise,
        classes(5),
        null_condition=no_class(5),
        guide=guide,
        generator=torch.Generator().manual_seed(1),
        num_inference_steps=5,
        **{"guidance_scale": 3.0} | guidance,
    )


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_what_changes_nothing_leaves_the_guided_images_as_they_were(objective):
    """φ = 0, and η = 1 with neither momentum nor threshold."""
    plain = drawn(objective=objective, sampler="edm")
    options = {"guidance_rescale": 0.0, "apg_eta": 1.0, "apg_norm_threshold": 0.0, "apg_momentum": 0.0}
    assert torch.equal(drawn(objective=objective, sampler="edm", **options), plain)
    one = {"guidance_scale": 1.0, "guidance_rescale": 0.7, "apg_eta": 0.0, "apg_momentum": -0.5}
    unguided = drawn(objective=objective, sampler="edm", guidance_scale=1.0)
    assert torch.equal(drawn(objective=objective, sampler="edm", **one), unguided)
    assert not torch.equal(plain, unguided)


@pytest.mark.parametrize(
    "guidance",
    [
        {"guidance_rescale": 0.7},
        {"apg_eta": 0.0},
        {"apg_norm_threshold": 0.1},
        {"apg_momentum": -0.5},
        {"guidance_schedule": "linear"},
        {"guidance_schedule": "cosine"},
        {"guidance_schedule": "power-cosine"},
    ],
)
def test_every_way_of_guidance_changes_images_each_alone(guidance):
    """Image by image: the same in a batch and alone."""
    together = drawn(**guidance)
    assert together.isfinite().all() and not torch.equal(together, drawn())
    noise = standard_noise(5)[2:3]
    given = {"null_condition": no_class(1), "num_inference_steps": 5, "guidance_scale": 3.0}
    alone = denoise(ClassData(), create_scheduler("flow"), noise, classes(1), **given, **guidance)
    torch.testing.assert_close(drawn_from(noise, guidance), alone)


def drawn_from(noise, guidance):
    """That image as it comes out of a batch with others."""
    others = torch.cat([standard_noise(3), noise])
    given = {"null_condition": no_class(4), "num_inference_steps": 5, "guidance_scale": 3.0}
    return denoise(ClassData(), create_scheduler("flow"), others, classes(4), **given, **guidance)[3:]


def test_an_update_is_its_parallel_and_its_orthogonal_part():
    update, along = torch.randn(2, 3, 4, 5, 5).unbind()
    parallel, orthogonal = decompose(update, along)
    torch.testing.assert_close(parallel + orthogonal, update)
    products = (orthogonal * along).flatten(1).sum(1)
    assert float(products.abs().max()) < 1e-4
    cosines = torch.cosine_similarity(parallel.flatten(1), along.flatten(1)).abs()
    torch.testing.assert_close(cosines, torch.ones(3))
    assert not decompose(update, torch.zeros_like(along))[0].any()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_apgs_update_of_the_clean_latents_is_orthogonal_and_within_its_threshold(kind):
    process = Process(kind, create_scheduler("ddpm").alphas_cumprod)
    better, worse, noisy = torch.randn(3, 2, 4, 6, 6).unbind()
    before = process.clean(noisy, better, 400.0)
    for threshold, norm in ((0.0, None), (0.5, 0.5)):
        guider = Guider(Guidance(guidance_scale=2, apg_eta=0, apg_norm_threshold=threshold), process)
        update = process.clean(noisy, guider(better, worse, 2.0, noisy, 400.0), 400.0) - before
        assert float((update * before).flatten(1).sum(1).abs().max()) < 1e-2
        norms = update.flatten(1).norm(dim=1)
        assert (norms < norm + 1e-4).all() if norm else (norms > 1).all()


def test_apgs_momentum_adds_the_updates_before():
    """β² of the first, β of the second, and the third."""
    better, noisy = torch.randn(2, 1, 4, 3, 3).unbind()
    updates = torch.randn(3, 1, 4, 3, 3)
    guider = Guider(Guidance(guidance_scale=2, apg_momentum=-0.5), FLOW)
    for update in updates:
        guided = guider(better, better - update, 2.0, noisy, 500.0)
    torch.testing.assert_close(guided - better, 0.25 * updates[0] - 0.5 * updates[1] + updates[2])


def test_a_share_of_one_gives_the_guided_prediction_the_models_deviation():
    better, guided = torch.randn(3, 4, 8, 8), 5 * torch.randn(3, 4, 8, 8)
    deviation = better.flatten(1).std(dim=1)
    torch.testing.assert_close(rescale(guided, better, 1.0).flatten(1).std(dim=1), deviation)
    torch.testing.assert_close(rescale(guided, better, 0.25), 0.25 * rescale(guided, better, 1.0) + 0.75 * guided)


def test_a_constant_guided_prediction_has_no_deviation_to_restore():
    better, guided = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    guided[0] = 0.5
    rescaled = rescale(guided, better, 0.7)
    assert torch.allclose(rescaled[0], guided[0]) and rescaled.isfinite().all()
    assert not torch.allclose(rescaled[1], guided[1])


def test_schedules_are_what_is_published():
    """1 + (w - 1)·f(l) with l = 1 at noise; of `linear` and `cosine` the mean over levels is w's."""

    def weights(schedule, **options):
        guidance = Guidance(guidance_scale=3.0, guidance_schedule=schedule, **options)
        return [guidance.weight(level) for level in (0.0, 0.25, 0.5, 1.0)]

    assert weights("constant") == [3, 3, 3, 3]
    assert weights("linear") == [5, 4, 3, 1]
    assert weights("cosine") == pytest.approx([5, 3 + math.sqrt(2), 3, 1])
    assert weights("power-cosine", guidance_power=1.0) == pytest.approx([3, 2 + math.sqrt(0.5), 2, 1])
    assert weights("power-cosine", guidance_power=2.0)[2] == pytest.approx(2 - math.sqrt(0.5))
    assert Guidance(3.0, (0.3, 0.8), "linear").weight(0.2) == 1


def test_where_a_schedule_does_not_guide_there_is_one_forward():
    batches, model = [], ClassData()

    def counted(noisy, timesteps, class_labels):
        batches.append(len(noisy))
        return model(noisy, timesteps, class_labels)

    drawn(counted, guidance_schedule="linear")
    assert batches == [5, 10, 10, 10, 10]  # t = 1, where it is 1, then 0.8, …


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_a_model_that_guides_itself_draws_as_without_guidance(objective):
    itself = drawn(objective=objective, guide=ClassData(objective))
    assert torch.equal(itself, drawn(objective=objective, guidance_scale=1.0))


def test_autoguidance_leads_away_from_the_guides_prediction_of_the_same_class():
    """guide + w·(model - guide), which for predictions apart by a constant is one of a model further away."""
    asked = []

    class Worse(ClassData):
        def __call__(self, noisy, timesteps, class_labels):
            asked.append((len(noisy), class_labels.unique().tolist()))
            return super().__call__(noisy, timesteps, class_labels)

    guided = drawn(ClassData(shift=1.0), guide=Worse(shift=0.4), guidance_scale=2.5)
    torch.testing.assert_close(guided, drawn(ClassData(shift=0.4 + 2.5 * 0.6), guidance_scale=1.0))
    assert asked == [(5, [0])] * 5


def test_momentum_counts_forwards_and_not_steps(monkeypatch):
    updates = []
    call = Guider.__call__
    monkeypatch.setattr(Guider, "__call__", lambda self, *given: (updates.append(given[-1]), call(self, *given))[1])
    drawn(sampler="heun", apg_momentum=-0.5)
    assert len(updates) == 9 == len(set(updates)) + 4


def test_dopri5_is_guided_but_without_momentum():
    scheduler = create_scheduler("flow", "dopri5")
    given = {"null_condition": no_class(3), "guidance_scale": 2.0}
    latents = denoise(ClassData(), scheduler, standard_noise(3), classes(3), **given, apg_eta=0.5)
    assert latents.shape == (3, 4, 1, 1) and latents.isfinite().all()
    with pytest.raises(InputError, match=r"^apg_momentum=-0.5: FlowMatchDopri5Scheduler asks at times in no order"):
        denoise(ClassData(), scheduler, standard_noise(3), classes(3), **given, apg_momentum=-0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale=0.5: wanted 1"),
        ({"guidance_schedule": "triangle"}, "guidance_schedule='triangle': wanted one of constant, linear, cosine"),
        ({"guidance_power": 0}, "guidance_power=0: wanted a number above 0"),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5: wanted a share"),
        ({"apg_eta": -0.1}, "apg_eta=-0.1"),
        ({"apg_norm_threshold": math.inf}, "apg_norm_threshold=inf"),
        ({"apg_momentum": 1}, "apg_momentum=1: wanted a number between -1 and 1"),
    ],
)
def test_guidance_that_cannot_be_is_refused(options, says):
    with pytest.raises(InputError, match=f"^{says}"):
        Guidance(**options)
