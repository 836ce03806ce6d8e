"""The pipeline's and the command's arguments of guidance, a guide, and diffusers' arguments of a call."""

import json
import re

import pytest
import torch
from made.captions import WORDS, write_tokenizer
from made.runs import CLASS_NAMES, make_run, pipeline, tiny_model, tiny_vae
from transformers import CLIPTextConfig, CLIPTextModel

from gspn_dit.commands import SampleOptions
from gspn_dit.config import Config, SamplingConfig
from gspn_dit.diffusion import create_scheduler, image_generator
from gspn_dit.errors import InputError
from gspn_dit.inference.loading import load_pipeline
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.inference.run_description import RunDescription
from gspn_dit.inference.sample import main
from gspn_dit.models import create_model
from gspn_dit.options import command, parse
from gspn_dit.text.parts import TextParts
from gspn_dit.text.tokens import load_tokenizer
from gspn_dit.training.diffusion import check_options


def generators(n):
    return [image_generator(0, i) for i in range(n)]


def latents_of(pipe, labels=(0, 1), **options):
    given = {"generator": generators(len(labels)), "num_inference_steps": 3, "output_type": "latent"}
    return pipe(list(labels), **given | options).images


def sample(*arguments):
    command(main, SampleOptions, prog="sample.py", argv=[*map(str, arguments), "--device", "cpu"])


def made(**changes):
    """A transformer of the flow that differs from `pipeline`'s in what is given."""
    given = {"sample_size": 8, "num_classes": 3, "out_channels": 4} | changes
    return create_model("dit-ti-2", **given).eval()


def test_images_of_a_label_are_as_many_as_are_asked_for():
    pipe = pipeline()
    one_each = latents_of(pipe, (0, 0, 2, 2))
    assert torch.equal(latents_of(pipe, (0, 2), num_images_per_prompt=2, generator=generators(4)), one_each)
    with pytest.raises(InputError, match="generator: a list of 2 for 4 class_labels"):
        latents_of(pipe, (0, 2), num_images_per_prompt=2)
    with pytest.raises(InputError, match="num_images_per_prompt=0: wanted 1 or more"):
        latents_of(pipe, num_images_per_prompt=0)


def test_latents_that_are_given_are_the_noise():
    pipe = pipeline()
    noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators(2)])
    assert torch.equal(latents_of(pipe, latents=noise, generator=None), latents_of(pipe))
    with pytest.raises(InputError, match=r"latents: of shape \(1, 4, 8, 8\); wanted \(2, 4, 8, 8\)"):
        latents_of(pipe, latents=noise[:1])


def test_levels_that_are_given_are_those_of_the_call():
    pipe, seen = pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda model, inputs: seen.append(float(inputs[1][0])))
    latents_of(pipe, sigmas=[1.0, 0.5])
    latents_of(pipe, timesteps=[900.0, 300.0])
    assert seen == pytest.approx([1000, 500, 900, 300])
    with pytest.raises(InputError, match="only one of timesteps and sigmas"):
        latents_of(pipe, sigmas=[1.0], timesteps=[1000])


def test_a_callback_gets_what_it_asks_for():
    pipe, seen = pipeline(), []

    def callback(pipe, step, timestep, tensors):
        seen.append({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        return {}

    asked = {"callback_on_step_end": callback, "num_inference_steps": 2}
    latents_of(pipe, **asked, callback_on_step_end_tensor_inputs=["latents", "noise_pred"])
    pipe.scheduler = create_scheduler("flow", "dopri5", {"rtol": 0.1})
    latents_of(pipe, **asked, callback_on_step_end_tensor_inputs=["noise_pred"])
    shape = (2, 4, 8, 8)
    assert seen == [{"latents": shape, "noise_pred": shape}] * 2 + [{"noise_pred": shape}]
    with pytest.raises(InputError, match=r"callback_on_step_end_tensor_inputs=\['prompt'\]: wanted some of latents"):
        latents_of(pipe, callback_on_step_end_tensor_inputs=["latents", "prompt"])


@pytest.mark.parametrize("sampler", ["sde", "edm"])
def test_a_pipeline_is_saved_with_our_schedulers(tmp_path, sampler):
    pipe = pipeline(guidance_scale=2.0, guidance_options={"guidance_schedule": "cosine"})
    options = {"sde": {"diffusion_form": "constant"}, "edm": {"S_churn": 2.0}}[sampler]
    pipe.scheduler = create_scheduler("flow", sampler, options)
    pipe.save_pretrained(tmp_path)
    loaded = GSPNDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(loaded), latents_of(pipe))
    assert loaded.guidance().guidance_schedule == "cosine"


def test_a_guide_is_what_guidance_leads_away_from(tmp_path):
    pipe, plain = pipeline(guidance_scale=3.0), latents_of(pipeline())
    cfg = latents_of(pipe)
    pipe.guide_by(pipeline())
    torch.testing.assert_close(latents_of(pipe), plain)  # itself
    with torch.no_grad():
        next(pipe.guide.parameters()).add_(0.05)
    guided = latents_of(pipe)
    assert not torch.allclose(guided, plain) and not torch.allclose(guided, cfg)
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(loaded), guided)


def test_a_model_that_never_learned_the_null_class_has_autoguidance():
    pipe = pipeline(class_dropout=0.0)
    with pytest.raises(InputError, match=r"class_dropout 0"):
        latents_of(pipe, guidance_scale=2.0)
    pipe.guide_by(pipeline())
    torch.testing.assert_close(latents_of(pipe, guidance_scale=2.0), latents_of(pipe))


def other_vae():
    vae = tiny_vae()
    with torch.no_grad():
        next(vae.encoder.parameters()).add_(1)
    return vae


@pytest.mark.parametrize(
    ("guide", "says"),
    [
        (lambda: pipeline(objective="ddpm"), "8 channels of predictions, and the model 4"),
        (lambda: (made(num_classes=5), tiny_vae(), None), "5 classes, and the model 3"),
        (lambda: (made(sample_size=16), tiny_vae(), None), "16 rows of latents, and the model 8"),
        (lambda: (made(), other_vae(), None), "its latents are of another VAE"),
        (lambda: (made(), tiny_vae(), ["a", "b", "c"]), "its classes have other names"),
    ],
)
def test_a_guide_of_another_kind_is_refused(guide, says):
    other = guide()
    if isinstance(other, tuple):
        transformer, vae, names = other
        other = GSPNDiTPipeline(transformer, vae, create_scheduler("flow"), class_names=names)
    with pytest.raises(InputError, match=f"^guide: .*{says}") as error:
        pipeline().guide_by(other)
    assert "\n" not in str(error.value)


def test_a_guide_of_another_process_is_refused():
    pipe, other = pipeline(objective="ddpm"), pipeline(objective="ddpm")
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, beta_end=0.012)
    with pytest.raises(InputError, match=r"^guide: it has another objective .*beta_end 0.012 and not 0.02"):
        pipe.guide_by(other)


def test_a_pipelines_twin_of_another_sampler_is_a_guide():
    """PNDM's config has no rescale_betas_zero_snr, which stands for False."""
    pipe = pipeline(objective="ddpm")
    pipe.scheduler = create_scheduler("ddpm", "PNDMScheduler", like=pipe.scheduler)
    pipe.guide_by(pipeline(objective="ddpm"))
    assert pipe.guide is not None


def of_text(tokenizer, text_encoder=None):
    options = TextParts(tokenizer, text_encoder).model_options
    transformer = create_model("gspn-t2i-ti-2", sample_size=8, out_channels=4, **options)
    given = {"tokenizer": tokenizer, "text_encoder": text_encoder}
    return GSPNDiTPipeline(transformer, tiny_vae(), create_scheduler("flow"), **given)


def test_a_guide_reads_texts_as_the_model_does(tmp_path):
    mine = load_tokenizer(write_tokenizer(tmp_path / "mine"), 16)
    other = load_tokenizer(write_tokenizer(tmp_path / "other", words=WORDS[::-1]), 16)  # as many words, otherwise
    of_text(mine).guide_by(of_text(mine))
    with pytest.raises(InputError, match=r"^guide: its texts are read by tokenizer \w+, and the model's by tokenizer"):
        of_text(mine).guide_by(of_text(other))
    encoder, trained_on = (tiny_text_encoder(mine, seed) for seed in (0, 1))
    of_text(mine, encoder).guide_by(of_text(mine, encoder))
    with pytest.raises(InputError, match=r"^guide: its texts are read by CLIPTextModel"):
        of_text(mine, encoder).guide_by(of_text(mine, trained_on))


def tiny_text_encoder(tokenizer, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes)
    return CLIPTextModel(config).eval()


def test_a_power_without_its_schedule_is_refused(tmp_path, capsys):
    options = ["--model", make_run(tmp_path / "run"), "--num-images", 1, "--out", f"{tmp_path / 'images'}/"]
    with pytest.raises(SystemExit):
        sample(*options, "--guidance-power", 2)
    *_, last = capsys.readouterr().err.splitlines()
    assert "--guidance-power=2.0: the guidance schedule constant has no power" in last


def test_a_sampler_that_chooses_its_steps_goes_on_whatever_their_number(tmp_path):
    out = tmp_path / "images"
    options = ["--model", make_run(tmp_path / "run"), "--num-images", 2, "--out", f"{out}/", "--sampler", "dopri5"]
    options += ["--scheduler-options", "rtol=0.5,atol=0.5"]
    sample(*options, "--num-inference-steps", 3)
    (out / "000001.png").unlink()
    sample(*options, "--num-inference-steps", 7)
    assert (out / "000001.png").exists()


def test_sample_with_a_guide_and_a_scheduler_by_name_goes_on_as_it_began(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=(1, 2))
    earlier = run / "checkpoints" / "step-0000001"
    out = tmp_path / "images"
    options = ["--model", run, "--num-images", 2, "--out", f"{out}/", "--num-inference-steps", 2]
    guided = [*options, "--guide", earlier, "--apg-eta", 0.5]
    guided += ["--sampler", "UniPCMultistepScheduler", "--scheduler-options", "solver_order=1,flow_shift=2.0"]
    sample(*guided)
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["sampler"], settings["scheduler"]["flow_shift"]) == ("UniPCMultistepScheduler", 2.0)
    assert settings["apg_eta"] == 0.5 and settings["guide_weights"] != settings["model_weights"]
    first = (out / "000001.png").read_bytes()
    (out / "000001.png").unlink()
    sample(*guided)
    assert (out / "000001.png").read_bytes() == first
    for others, says in (
        ([*options], "begun with guide_weights="),
        ([*options, "--guide", earlier, "--guidance-scale", 1], "--guide=.*: at guidance_scale 1 nothing"),
        ([*options, "--guide", tmp_path / "none"], "--guide=.*no such folder"),
        ([*options, "--scheduler-options", "steps=2"], "--scheduler-options=.*has no steps"),
    ):
        with pytest.raises(SystemExit):
            sample(*others)
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("sample.py: error: ")
        assert re.search(says, last), last


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--sampler", "dopri5", "--apg-momentum", "-0.5"], "--apg-momentum=-0.5: FlowMatchDopri5Scheduler asks"),
        (["--sampler", "sde", "--num-inference-steps", "1"], "--num-inference-steps=1: wanted 2 or more"),
    ],
)
def test_a_command_that_cannot_be_leaves_no_folder_behind(tmp_path, capsys, wrong, says):
    out = tmp_path / "images"
    options = ["--model", make_run(tmp_path / "run", objective="flow"), "--num-images", 1, "--out", f"{out}/"]
    options += ["--guidance-scale", 2]
    with pytest.raises(SystemExit):
        sample(*options, *wrong)
    *_, last = capsys.readouterr().err.splitlines()
    assert says in last
    assert not (out / "settings.json").exists()


def test_a_run_that_could_not_draw_its_samples_does_not_begin():
    for options, says in (
        ({"sampler": "dopri5", "apg_momentum": -0.5}, r"^sampling.apg_momentum=-0.5: FlowMatchDopri5Scheduler asks"),
        ({"sampler": "sde", "num_inference_steps": 1}, r"^sampling.num_inference_steps=1: wanted 2 or more"),
    ):
        config = Config()
        config.diffusion.objective = "flow"
        config.sampling = SamplingConfig(**options)
        with pytest.raises(InputError, match=says):
            check_options(config)


def test_an_older_folder_goes_on_without_the_newer_settings(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "images"
    options = ["--model", run, "--num-images", 2, "--out", f"{out}/", "--num-inference-steps", 1]
    sample(*options)
    settings = json.loads((out / "settings.json").read_text())
    for name in ("guide_weights", "guidance_schedule", "guidance_power", "guidance_rescale", "apg_eta"):
        del settings[name]
    (out / "settings.json").write_text(json.dumps(settings))
    (out / "000000.png").unlink()
    sample(*options)
    assert (out / "000000.png").exists()


def test_a_runs_sampler_and_guidance_are_its_pipelines(tmp_path):
    words = ["--sampling.sampler", "sde", "--sampling.scheduler-options", "diffusion_form=sbdm,last_step=tweedie"]
    words += ["--sampling.guidance-schedule", "linear", "--sampling.apg-momentum", "-0.5"]
    config = parse(Config, words, exit_on_error=False)
    assert config.sampling.scheduler_options == {"diffusion_form": "sbdm", "last_step": "tweedie"}
    config.save(tmp_path / "config.yaml")
    run = RunDescription.read(tmp_path / "config.yaml")
    assert run.guidance_options["guidance_schedule"] == "linear" and run.guidance_options["apg_momentum"] == -0.5
    assert run.scheduler_options == config.sampling.scheduler_options
    with pytest.raises(InputError, match=r"^sampling.apg_eta=2: wanted a share"):
        SamplingConfig(apg_eta=2)
    with pytest.raises(InputError, match=r"sampling.guidance_rescale=3"):
        RunDescription.of({"sampling": {"guidance_rescale": 3}})


def test_the_models_names_of_classes_stand_for_a_guide_without_any():
    pipe = pipeline()
    pipe.guide_by(GSPNDiTPipeline(tiny_model("dit-ti-2", "flow"), tiny_vae(), create_scheduler("flow")))
    assert pipe.config.class_names == CLASS_NAMES
