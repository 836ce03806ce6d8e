"""A pipeline as a teacher: how it is found, and that its UNet is told what the pipeline itself tells it."""

import json

import pytest
import torch
from made.stable_diffusion import tiny_sd, tiny_sd_pipeline, tiny_sdxl_pipeline

from gspn_dit.errors import InputError
from gspn_dit.text.teacher import embed, embed_nothing, is_xl, load_teacher, text_sha256, trained_size

MAKE = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    made = {}
    for kind, make in MAKE.items():
        folder = tmp_path_factory.mktemp("teachers") / kind
        make(folder)
        made[kind] = load_teacher(folder)
    return made


def told_by_the_pipeline(pipe, **options):
    """What the UNet is called with in the first step of drawing."""
    calls = []

    def note(module, args, given):
        calls.append({"encoder_hidden_states": given["encoder_hidden_states"], **(given["added_cond_kwargs"] or {})})

    handle = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    pipe(num_inference_steps=1, height=32, width=32, output_type="latent", **options)
    handle.remove()
    return calls[0]


@pytest.mark.parametrize("kind", MAKE)
def test_it_is_told_what_the_pipeline_tells_it(teachers, kind):
    pipe, prompts = teachers[kind], ["a red 3", "a blue 7 above a green 1"]
    nothing, some = (
        {name: tensor for name, tensor in each.items() if name != "time_ids"}
        for each in _halves(told_by_the_pipeline(pipe, prompt=prompts, guidance_scale=5.0))
    )
    embedded = embed(pipe, prompts)
    assert embedded.keys() == some.keys() == nothing.keys() and ("text_embeds" in some) == is_xl(pipe)
    for name, tensor in embed_nothing(pipe).items():
        torch.testing.assert_close(embedded[name], some[name])
        torch.testing.assert_close(tensor.expand_as(nothing[name]), nothing[name])
        assert not torch.equal(some[name], nothing[name])


def _halves(told):
    """Of a call with guidance: what is told without a prompt, and with it."""
    return ({name: tensor.chunk(2)[i] for name, tensor in told.items()} for i in (0, 1))


def test_sdxl_is_told_zeros_for_no_prompt_or_the_empty_one(tmp_path):
    pipe = load_teacher(saved(tiny_sdxl_pipeline(), tmp_path / "zeros"))
    assert all(not tensor.any() for tensor in embed_nothing(pipe).values())
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    for name, tensor in embed_nothing(pipe).items():
        torch.testing.assert_close(tensor, embed(pipe, [""])[name][0])
        assert tensor.any()


def saved(pipe, folder):
    pipe.save_pretrained(folder)
    return folder


def test_what_draws_at_which_size_and_is_frozen(teachers):
    for pipe in teachers.values():
        assert trained_size(pipe) == 32
        assert not any(p.requires_grad for p in pipe.unet.parameters()) and not pipe.unet.training
    assert text_sha256(teachers["sd"]) != text_sha256(teachers["sdxl"])


def test_pipelines_whose_tokenizers_differ_are_told_apart(teachers):
    pipe, tokenizer = teachers["sdxl"], teachers["sdxl"].tokenizer_2
    before, pad = text_sha256(pipe), tokenizer.pad_token
    tokenizer.pad_token = "!"
    assert text_sha256(pipe) != before
    tokenizer.pad_token = pad
    assert text_sha256(pipe) == before


def test_what_is_no_teacher_is_answered_in_a_line(tmp_path):
    with pytest.raises(InputError, match="base='nowhere': no such folder, and no hub name"):
        load_teacher("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no readable model_index\.json"):
        load_teacher(tmp_path / "empty")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(InputError, match=r"is a 'FluxPipeline'.*StableDiffusionXLPipeline"):
        load_teacher(other)
    saved(tiny_sd_pipeline(unet=tiny_sd(in_channels=9)), tmp_path / "inpaint")
    with pytest.raises(InputError, match="takes 9 channels, of which 4 are latents"):
        load_teacher(tmp_path / "inpaint")
    broken = saved(tiny_sd_pipeline(), tmp_path / "broken")
    (broken / "unet" / "config.json").unlink()
    with pytest.raises(InputError, match="its files cannot be read"):
        load_teacher(broken)
