"""What users of diffusers do with a pipeline, they do with one whose attention is replaced."""

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from diffusers.utils import convert_state_dict_to_diffusers
from made.stable_diffusion import (
    TEXT_WIDTH,
    latents_of,
    stirred,
    tiny_controlnet,
    tiny_sd,
    tiny_sd2,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from gspn_dit import replace_self_attention
from gspn_dit.errors import InputError

PICTURE = np.full((1, 32, 48, 3), 0.5, np.float32)
KEEPS_PROJECTIONS = ("gspn", "linear", "window")


@torch.no_grad()
def noise(unet, **options):
    return unet(**latents_of(unet, 9, 12), **options).sample


def picture(pipeline, **options):
    options = {"num_inference_steps": 2, "output_type": "np", **options}
    return pipeline("a red 3", generator=torch.Generator().manual_seed(0), **options).images


def of_kind(cls, pipeline, **more):
    """The pipeline's models in one of another kind."""
    made = cls(
        **{**pipeline.components, **more}, **({} if "XL" in cls.__name__ else {"requires_safety_checker": False})
    )
    made.set_progress_bar_config(disable=True)
    return made


def text_to_image():
    return tiny_sd_pipeline(), {"height": 32, "width": 48}


def by_velocity():
    return tiny_sd_pipeline(unet=tiny_sd2(), prediction_type="v_prediction"), {"height": 32, "width": 48}


def xl():
    return tiny_sdxl_pipeline(), {"height": 32, "width": 48}


def image_to_image():
    return of_kind(StableDiffusionImg2ImgPipeline, tiny_sd_pipeline()), {"image": PICTURE, "strength": 1.0}


def xl_image_to_image():
    return of_kind(StableDiffusionXLImg2ImgPipeline, tiny_sdxl_pipeline()), {"image": PICTURE, "strength": 1.0}


def inpainting():
    mask = np.zeros((1, 32, 48), np.float32)
    mask[:, :16] = 1
    pipeline = of_kind(StableDiffusionInpaintPipeline, tiny_sd_pipeline(unet=tiny_sd(in_channels=9)))
    return pipeline, {"image": PICTURE, "mask_image": mask, "height": 32, "width": 48}


def controlled():
    pipeline = tiny_sd_pipeline()
    net = tiny_controlnet(pipeline.unet)
    return of_kind(StableDiffusionControlNetPipeline, pipeline, controlnet=net), {
        "image": torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)),
        "height": 32,
        "width": 48,
    }


@pytest.mark.parametrize(
    "make", [text_to_image, by_velocity, xl, image_to_image, xl_image_to_image, inpainting, controlled]
)
def test_pipelines_of_every_kind_draw_with_it(make):
    pipeline, options = make()
    before = picture(pipeline, **options)
    replacement = replace_self_attention(pipeline, seed=0, chunk=4).mount(pipeline)
    mounted = picture(pipeline, **options)
    assert mounted.shape == before.shape and np.isfinite(mounted).all() and not np.array_equal(mounted, before)
    replacement.unmount()
    assert np.array_equal(picture(pipeline, **options), before)


@pytest.mark.parametrize("mixer", KEEPS_PROJECTIONS)
def test_a_lora_file_made_for_attention_acts_on_it(mixer, tmp_path):
    pipeline = tiny_sd_pipeline()
    pipeline.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    assert sum(".attn1." in key for key in weights) == 2 * 4 * 7
    StableDiffusionImg2ImgPipeline.save_lora_weights(tmp_path, unet_lora_layers=weights)
    pipeline = tiny_sd_pipeline()
    replacement = stirred(replace_self_attention(pipeline, mixer, seed=0)).mount(pipeline)
    before = noise(pipeline.unet)
    pipeline.load_lora_weights(tmp_path)
    layers = [name for name, module in pipeline.unet.named_modules() if isinstance(module, LoraLayer)]
    assert sum(".attn1." in name for name in layers) == 4 * 7
    adapted = noise(pipeline.unet)
    # the layers of attn1 have a part in it, beside those of attn2
    for name in layers:
        if ".attn2." in name:
            pipeline.unet.get_submodule(name).enable_adapters(False)
    assert not torch.allclose(noise(pipeline.unet), before, atol=1e-4)
    assert not torch.allclose(noise(pipeline.unet), adapted, atol=1e-4)
    with pytest.raises(InputError, match="unload the LoRA"):
        replacement.save_pretrained(tmp_path / "layers")
    pipeline.unload_lora_weights()
    assert torch.equal(noise(pipeline.unet), before)
    replacement.save_pretrained(tmp_path / "layers")


def test_a_lora_is_loaded_after_mounting():
    unet = tiny_sd()
    replacement = replace_self_attention(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for refused in (lambda: replacement.mount(unet), lambda: replace_self_attention(unet)):
        with pytest.raises(InputError, match=r"adapter \(LoRA\) in place; unload it, and load it after mount\(\)"):
            refused()


@pytest.mark.parametrize("mixer", ["gspn", "fresh"])
def test_an_ip_adapter_acts_beside_it(mixer, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pipeline = tiny_sd_pipeline()
    widths = [
        pipeline.unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for name in pipeline.unet.attn_processors
        if ".attn2." in name
    ]
    adapter = {
        "image_proj.proj.weight": torch.randn(4 * TEXT_WIDTH, 16, generator=generator),
        "image_proj.proj.bias": torch.zeros(4 * TEXT_WIDTH),
        "image_proj.norm.weight": torch.ones(TEXT_WIDTH),
        "image_proj.norm.bias": torch.zeros(TEXT_WIDTH),
    }
    for place, width in enumerate(widths):
        for part in "kv":
            weight = torch.randn(width, TEXT_WIDTH, generator=generator)
            adapter[f"ip_adapter.{2 * place + 1}.to_{part}_ip.weight"] = weight
    save_file(adapter, tmp_path / "adapter.safetensors")
    replace_self_attention(pipeline, mixer, seed=0).mount(pipeline)
    size = {"height": 32, "width": 48}
    before = picture(pipeline, **size)
    pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None)
    embeds = [torch.randn(2, 1, 16, generator=generator)]
    pictures = []
    for scale in (0.0, 1.0):
        pipeline.set_ip_adapter_scale(scale)
        pictures.append(picture(pipeline, ip_adapter_image_embeds=embeds, **size))
    np.testing.assert_allclose(pictures[0], before, atol=1e-4)
    assert not np.allclose(pictures[1], before, atol=1e-3)


@pytest.mark.parametrize("mixer", ["gspn", "fresh", "linear", "window"])
def test_projections_can_be_fused(mixer, tmp_path):
    unet = tiny_sd()
    replacement = stirred(replace_self_attention(unet, mixer, seed=0)).mount(unet)
    before, keys = noise(unet), list(replacement.state_dict())
    unet.fuse_qkv_projections()
    if mixer in ("gspn", "window"):  # the fused layer is what runs
        layer = replacement.layer(replacement.layer_names[0])
        with torch.no_grad():
            layer.to_q.weight.mul_(2)
    torch.testing.assert_close(noise(unet), before, atol=1e-5, rtol=1e-5)
    assert list(replacement.state_dict()) == keys
    replacement.save_pretrained(tmp_path)
    type(replacement).from_pretrained(tmp_path)
    unet.unfuse_qkv_projections()
    if mixer in ("gspn", "window"):
        with torch.no_grad():
            layer.to_q.weight.div_(2)
    assert torch.equal(noise(unet), before)


def test_processors_that_change_no_result_change_none():
    unet = tiny_sd()
    replace_self_attention(unet, seed=0).mount(unet)
    before, count = noise(unet), len(tiny_sd().attn_processors)
    assert len(unet.attn_processors) == count
    for processor in (AttnProcessor(), AttnProcessor2_0()):
        unet.set_attn_processor(processor)
        torch.testing.assert_close(noise(unet), before, atol=1e-5, rtol=1e-5)
    unet.set_attention_slice("auto")
    torch.testing.assert_close(noise(unet), before, atol=1e-5, rtol=1e-5)
    unet.set_attn_processor(dict.fromkeys(unet.attn_processors, AttnProcessor2_0()))
    assert torch.equal(noise(unet), before)


class Sharper(AttnProcessor2_0):
    """As users write one: what it inherits says nothing of what it computes."""


@pytest.mark.parametrize("processor", [PAGIdentitySelfAttnProcessor2_0, Sharper])
def test_a_processor_that_changes_the_result_is_refused(processor):
    unet = tiny_sd()
    replace_self_attention(unet, seed=0).mount(unet)
    with pytest.raises(InputError, match=f"no softmax attention that {processor.__name__} could compute"):
        unet.set_attn_processor(processor())


def test_options_for_cross_attention_do_not_disturb_it(caplog):
    unet = tiny_sd()
    replace_self_attention(unet, keep_attention="mid_block").mount(unet)
    before = noise(unet)
    given = {"scale": 1.0}
    assert torch.equal(noise(unet, cross_attention_kwargs=given), before)
    assert given == {"scale": 1.0} and "gspn_dit" not in caplog.text


def test_dropout_acts_in_training_alone():
    unet = tiny_sd(dropout=0.0)
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.to_out[1].p = module.dropout = 0.5
    for mixer in ("gspn", "fresh"):
        layer = replace_self_attention(unet, mixer, seed=0).layer("mid_block.attentions.0.transformer_blocks.0.attn1")
        layer.size = (4, 4)
        if mixer == "fresh":
            torch.nn.init.ones_(layer.mixer.proj.weight)
        x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
        assert (layer.train()(x) == 0).float().mean() > 0.3
        assert (layer.eval()(x) == 0).float().mean() < 0.1
