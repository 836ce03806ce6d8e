"""The diffusers pipeline: what it draws, what it refuses, and that it comes back from every kind of folder."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from made.runs import CLASS_NAMES, make_run, pipeline, tiny_model, tiny_vae
from PIL import Image

from gspn_dit.autoencoder import decode
from gspn_dit.diffusion import create_scheduler, image_generator
from gspn_dit.errors import InputError
from gspn_dit.inference.loading import load_pipeline
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.models import create_model
from gspn_dit.precision import choose_precision
from gspn_dit.storage.pictures import save_grid


def generators(*images: int, seed: int = 0) -> list[torch.Generator]:
    return [image_generator(seed, i) for i in images]


@pytest.mark.parametrize(
    ("name", "objective"),
    [("dit-ti-2", "ddpm"), ("gspn-ti-2", "ddpm"), ("gspn-dit-ti-1", "flow"), ("dit-ti-4", "flow")],
)
def test_image_depends_on_seed_and_index_alone(name, objective):
    pipe = pipeline(name, objective, guidance_scale=2.0, num_inference_steps=4)
    labels = [0, 1, 2, 0, 1]
    together = pipe(labels, generator=generators(*range(5)), output_type="pt").images
    alone = [pipe([label], generator=generators(i), output_type="pt").images for i, label in enumerate(labels)]
    assert together.shape == (5, 3, 16, 16)
    assert float((torch.cat(alone) - together).abs().max()) <= 1.001 / 255
    assert not torch.equal(together[0], together[3])  # same class, another image


def test_noise_is_the_same_to_the_bit():
    pipe, seen = pipeline(num_inference_steps=1), []
    pipe.transformer.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0].clone()))
    for images in [range(5), *([i] for i in range(5))]:
        pipe([0] * len(images), generator=generators(*images), output_type="latent")
    assert torch.equal(torch.cat(seen[1:]), seen[0])


def test_output_types_are_one_picture():
    pipe = pipeline(num_inference_steps=2)

    def draw(output_type, **options):
        return pipe([0, 1], generator=generators(0, 1), output_type=output_type, **options)

    pictures = decode(pipe.vae, draw("latent").images)  # uint8 (2, 3, 16, 16)
    torch.testing.assert_close(draw("pt").images, pictures.float() / 255)
    np.testing.assert_allclose(draw("np").images, pictures.permute(0, 2, 3, 1).numpy() / 255, atol=1e-6)
    assert torch.equal(draw("uint8").images, pictures)
    for image, picture in zip(draw("pil").images, pictures, strict=True):
        assert isinstance(image, Image.Image)
        np.testing.assert_array_equal(np.asarray(image), picture.permute(1, 2, 0))
    assert torch.equal(draw("pt", return_dict=False)[0], draw("pt").images)


def test_mixed_precision_is_the_transformers_alone():
    pipe, seen = pipeline(num_inference_steps=2), []
    for module in (pipe.transformer, pipe.vae.decoder):
        module.register_forward_pre_hook(lambda module, inputs: seen.append(torch.is_autocast_enabled("cpu")))
    images = {
        precision: pipe([0], generator=generators(0), output_type="pt", mixed_precision=precision).images
        for precision in ("no", "bf16", "auto")
    }
    native = choose_precision("auto", torch.device("cpu")).native
    assert seen == [False, False, False, True, True, False, native, native, False]
    assert torch.equal(images["auto"], images["bf16" if native else "no"])
    assert 0 < float((images["bf16"] - images["no"]).abs().max()) < 0.1


def test_labels_and_guidance_change_the_picture():
    pipe = pipeline(num_inference_steps=3)

    def draw(label, **options):
        return pipe(label, generator=generators(0), output_type="latent", **options).images

    assert torch.equal(draw("tabby cat"), draw(1))
    assert torch.equal(draw(np.int64(1)), draw(np.array([1])))
    assert not torch.equal(draw(0), draw(1))
    assert not torch.equal(draw(0), draw(0, guidance_scale=3.0))
    # Levels of 3 Euler steps are 1, 2/3, 1/3: none in this interval, so guidance never acts.
    assert torch.equal(draw(0), draw(0, guidance_scale=3.0, guidance_interval=(0.7, 0.9)))


@pytest.mark.parametrize("name", ["dit-ti-2", "gspn-ti-2", "gspn-dit-ti-2"])
def test_other_sizes(name):
    images = pipeline(name)([0], height=24, width=36, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 24, 36, 3)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("objective", "kind", "options"),
    [
        ("ddpm", DDIMScheduler, {}),
        ("ddpm", DPMSolverMultistepScheduler, {}),
        ("ddpm", UniPCMultistepScheduler, {}),
        ("ddpm", EulerDiscreteScheduler, {}),
        ("flow", FlowMatchHeunDiscreteScheduler, {}),
        ("flow", UniPCMultistepScheduler, FLOW),
    ],
)
def test_swapped_scheduler(objective, kind, options):
    pipe = pipeline("dit-ti-2", objective, num_inference_steps=10)
    own = pipe([0], generator=generators(0), output_type="latent").images
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    swapped = pipe([0], generator=generators(0), output_type="latent").images
    assert swapped.isfinite().all()
    assert not torch.equal(own, swapped)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_swapping_a_scheduler_back_gives_the_chain_that_was_trained(sampler):
    """Whichever sampler a pipeline was saved with: no clipping of latents to [-1, 1], and the learned variance."""
    pipe = pipeline("dit-ti-2", "ddpm", num_inference_steps=10)
    own = pipe([0], generator=generators(0), output_type="latent").images
    config = create_scheduler("ddpm", sampler).config
    pipe.scheduler = type(pipe.scheduler).from_config(config, timestep_spacing="linspace")
    assert torch.equal(pipe([0], generator=generators(0), output_type="latent").images, own)


def test_callback_on_step_end():
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    latents = pipeline()([0], num_inference_steps=3, output_type="latent", callback_on_step_end=callback).images
    assert steps == [0, 1, 2]
    assert not latents.any()


@pytest.mark.parametrize("class_names", [CLASS_NAMES, None])
def test_save_and_load_round_trip(tmp_path, class_names):
    pipe = pipeline("gspn-dit-ti-2", "ddpm", guidance_scale=2.0, num_inference_steps=3, guidance_interval=[0.2, 0.8])
    pipe.register_to_config(class_names=class_names)
    before = pipe([0, 1], generator=generators(0, 1), output_type="pt").images
    pipe.save_pretrained(tmp_path)
    for loaded in (GSPNDiTPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        loaded.set_progress_bar_config(disable=True)
        assert loaded.config.class_names == class_names
        assert type(loaded.scheduler) is type(pipe.scheduler)
        assert torch.equal(loaded([0, 1], generator=generators(0, 1), output_type="pt").images, before)


def test_two_class_names_survive(tmp_path):
    """diffusers reads a pair in model_index.json as a component's library and class, unless told otherwise."""
    model = create_model("dit-ti-2", sample_size=8, num_classes=2, out_channels=4)
    GSPNDiTPipeline(model, tiny_vae(), create_scheduler("flow"), class_names=["cat", "dog"]).save_pretrained(tmp_path)
    assert load_pipeline(tmp_path).config.class_names == ["cat", "dog"]


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_a_run_and_its_export_draw_alike(tmp_path, objective):
    run = make_run(tmp_path / "run", objective=objective, steps=(9, 10))
    for unfinished in ("step-0000011.tmp", "step-0000012"):  # no checkpoint's name; no metadata.json
        (run / "checkpoints" / unfinished / "ema").mkdir(parents=True)

    def draw(path):
        pipe = load_pipeline(path)
        pipe.set_progress_bar_config(disable=True)
        return pipe([0], generator=generators(0), output_type="latent").images

    newest = draw(run)
    assert torch.equal(newest, draw(run / "checkpoints" / "step-0000010"))
    assert not torch.equal(newest, draw(run / "checkpoints" / "step-0000009"))
    pipe = load_pipeline(run)
    assert pipe.config.class_names == CLASS_NAMES
    assert (pipe.config.guidance_scale, pipe.config.num_inference_steps) == (2.0, 3)
    assert pipe.config.guidance_interval == [0.1, 0.9]
    assert not pipe.transformer.training
    pipe.save_pretrained(tmp_path / "exported")
    assert torch.equal(newest, draw(tmp_path / "exported"))


def test_what_cannot_be_loaded_is_said(tmp_path):
    run = make_run(tmp_path / "run", steps=())
    (tmp_path / "empty").mkdir()
    for name in ("model.pt", "model.yaml"):
        (tmp_path / name).write_text("")
    for path, words in (
        (tmp_path / "none", "no such folder, and no hub name"),
        (tmp_path / "empty", "not a run"),
        (tmp_path / "model.pt", "cannot be read as a file of torch"),
        (tmp_path / "model.yaml", "is a file; wanted a folder"),
        (run, "no checkpoint yet"),
    ):
        with pytest.raises(InputError, match=words) as error:
            load_pipeline(path)
        assert str(path) in str(error.value)
    run = make_run(tmp_path / "other")
    (run / "checkpoints" / "step-0000002" / "ema" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="model="):
        load_pipeline(run)


def other_channels(ema):
    config = json.loads((ema / "config.json").read_text())
    (ema / "config.json").write_text(json.dumps({**config, "width": 96}))


def other_class(ema):
    config = json.loads((ema / "config.json").read_text())
    (ema / "config.json").write_text(json.dumps({**config, "_class_name": "create_model"}))


def other_names(ema):
    (ema.parent / "class_names.json").write_text("[")


def half_the_weights(ema):
    weights = ema / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


@pytest.mark.parametrize("damage", [other_channels, other_class, other_names, half_the_weights])
def test_a_damaged_checkpoint_is_said_in_one_line(tmp_path, damage):
    run = make_run(tmp_path / "run")
    damage(run / "checkpoints" / "step-0000002" / "ema")
    with pytest.raises(InputError, match=r"^model=.*run") as error:
        load_pipeline(run)
    assert "\n" not in str(error.value)


def test_a_damaged_export_is_said_in_one_line(tmp_path):
    pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "transformer": ["gspn_dit", "GSPNNet"]}))
    with pytest.raises(InputError, match=r"^model="):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_labels": [3]}, "classes 0 to 2"),
        ({"class_labels": [-1]}, "classes 0 to 2"),
        ({"class_labels": [1.7]}, "class_labels=1.7: wanted class ids"),
        ({"class_labels": [None]}, "class_labels=None: wanted class ids"),
        ({"class_labels": ["golden retreiver"]}, "did you mean 'golden retriever'"),
        ({"height": 18}, "height=18: wanted a positive multiple of 4"),
        ({"width": 0}, "width=0"),
        ({"class_labels": []}, r"class_labels=\[\]: wanted one class id or name"),
        ({"class_labels": None}, "class_labels=None: wanted class ids"),
        ({"class_labels": 1.0}, "class_labels=1.0: wanted class ids"),
        ({"height": 32.0}, "height=32.0: wanted a positive multiple of 4"),
        ({"width": "32"}, "width='32': wanted a positive multiple of 4"),
        ({"height": 4 * 10**7, "width": 4 * 10**7}, "1 at a time take over .* PB, and the memory of cpu is .* GB"),
        *(({"guidance_scale": scale}, "guidance_scale=.*: wanted 1") for scale in (math.nan, math.inf, 0, -2, "2")),
        ({"guidance_interval": []}, r"guidance_interval=\[\]"),
        ({"guidance_interval": (0.5,)}, "guidance_interval"),
        ({"guidance_interval": (0.1, math.nan)}, "guidance_interval"),
        ({"guidance_interval": 0.5}, "guidance_interval=0.5"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({"num_inference_steps": -1}, "num_inference_steps=-1"),
        ({"generator": 0}, "generator=0: wanted a torch.Generator"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"mixed_precision": "float32"}, "mixed_precision='float32': wanted one of auto, no, bf16, fp16"),
        ({"generator": generators(0, 1)}, "generator: a list of 2 for 1"),
    ],
)
def test_bad_input_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        pipeline()(**{"class_labels": [0], **options})


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_what_training_never_saw_is_not_guided_by(tmp_path, dropout):
    """Neither from a run nor from its export, and not by default; a folder that does not know goes on as it was."""
    run = make_run(tmp_path / "run", class_dropout=dropout)  # whose sampling.guidance_scale is 2
    load_pipeline(run).save_pretrained(tmp_path / "exported")
    for folder in (run, tmp_path / "exported"):
        pipe = load_pipeline(folder)
        pipe.set_progress_bar_config(disable=True)
        assert (pipe.config.guidance_scale, pipe.config.class_dropout) == (1, dropout)
        with pytest.raises(InputError, match=f"guidance_scale=2: trained with .*class_dropout {dropout:g}, .*; give 1"):
            pipe([0], guidance_scale=2)
        calls = [(label, scale) for label in (0, 1) for scale in (None, 1)]
        first, own, second, _ = (
            pipe(label, guidance_scale=scale, generator=generators(0), output_type="latent").images
            for label, scale in calls
        )
        assert torch.equal(first, own)
        assert torch.equal(first, second) == (dropout == 1)  # no class was learned: both are of none
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    del index["class_dropout"]
    (tmp_path / "exported" / "model_index.json").write_text(json.dumps(index | {"guidance_scale": 3.0}))
    pipe = load_pipeline(tmp_path / "exported")
    assert (pipe.config.guidance_scale, pipe.config.class_dropout) == (3, None)
    pipe([0], guidance_scale=2)


def test_classes_called_by_numbers_are_known_by_their_names():
    """Folders 1, 10 and 2 are classes 0, 1 and 2: a typed 2 is the folder, not the class after the next."""
    pipe = pipeline(class_names=["1", "10", "2"])
    assert pipe.class_ids(["1", "10", "2"]) == pipe.class_ids([0, 1, 2]) == [0, 1, 2]
    with pytest.raises(InputError, match="class_labels='0': no class has that name"):
        pipe.class_ids(["0"])
    assert pipeline(class_names=["a", "b", "c"]).class_ids(["2", "a"]) == [2, 0]
    assert pipeline(class_names=["a", "404", "c"]).class_ids(["2", "404"]) == [2, 1]


def test_a_new_model_draws_without_its_dropout():
    model = create_model("gspn-ti-2", sample_size=8, num_classes=3, out_channels=4, stochastic_depth=0.5)
    assert model.training
    GSPNDiTPipeline(model, tiny_vae(), create_scheduler("flow"))
    assert not model.training


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="2 names for a transformer of 3"):
        GSPNDiTPipeline(tiny_model("dit-ti-2", "flow"), tiny_vae(), create_scheduler("flow"), class_names=["a", "b"])
    pipe = pipeline("dit-ti-2", "flow")
    pipe.scheduler = create_scheduler("ddpm")
    with pytest.raises(InputError, match="euler, heun"):
        pipe([0])


def test_grid_shows_every_image(tmp_path):
    images = torch.arange(1, 6, dtype=torch.uint8).mul(40).view(5, 1, 1, 1).expand(5, 3, 32, 48)
    save_grid(images, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    # 3 columns and 2 rows, twice as large, margins of 4
    assert grid.shape == (2 * (64 + 4) + 4, 3 * (96 + 4) + 4, 3)
    for i in range(5):
        row, column = divmod(i, 3)
        tile = grid[4 + row * 68 :, 4 + column * 100 :][:64, :96]
        assert (tile == 40 * (i + 1)).all()
    assert (grid[0] == 255).all()


def test_a_grid_says_over_each_image_what_it_is_of(tmp_path):
    images = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    save_grid(images, tmp_path / "grid.png", ["a class of a name that is long", "éclair", "3", "a\nb"])
    grid = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    side, line = 128, 15  # enlarged, so that the long name has room for its beginning
    assert grid.shape == (2 * (line + side + 4) + 4, 2 * (side + 4) + 4, 3)
    written = []
    for i in range(4):
        row, column = divmod(i, 2)
        left, top = 4 + column * (side + 4), 4 + row * (line + side + 4)
        assert (grid[top + line :, left:][:side, :side] == 128).all()  # nothing is written over an image
        written.append(grid[top : top + line, left : left + side] < 100)
        assert written[-1].any()
        assert (grid[:, left + side : left + side + 4] == 255).all()  # nor past its edge
    assert len({text.tobytes() for text in written}) == 4
    long, short = (text.any(axis=(0, 2)).nonzero()[0].max() for text in written[:2])
    assert long > 0.8 * side > 40 > short
    save_grid(images, tmp_path / "small.png", list("0123"))
    assert Image.open(tmp_path / "small.png").size == (2 * (64 + 4) + 4, 2 * (15 + 64 + 4) + 4)
