"""The model that training saves: diffusers' UNet and transformers' text encoder in one."""

import pytest
import torch

from gspn_dit.errors import InputError
from gspn_dit.models.macs import count_macs
from gspn_dit.models.text_to_image import TextToImageModel, filled_text_encoder, filled_unet

UNET = {
    **filled_unet({"block_out_channels": [8, 16], "layers_per_block": 1, "attention_head_dim": 2}),
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "sample_size": 8,
}
TEXT = {**filled_text_encoder({"hidden_size": 16, "num_hidden_layers": 1}), "vocab_size": 50}
TEXT |= {"max_position_embeddings": 6, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49}


def build(text=TEXT, **changes):
    torch.manual_seed(0)
    return TextToImageModel({**UNET, **changes}, text).eval()


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    return latents, torch.tensor([3, 900]), torch.randint(50, (batch, 6), generator=generator)


@torch.no_grad()
def test_a_saved_model_comes_back_whole(tmp_path):
    model, (latents, times, ids) = build(), inputs()
    model.save_pretrained(tmp_path)
    loaded = TextToImageModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(latents, times, input_ids=ids), model(latents, times, input_ids=ids))
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in model.named_parameters()}


@torch.no_grad()
def test_tokens_are_read_by_the_models_own_text_encoder():
    model, (latents, times, ids) = build(), inputs()
    states = model.text_encoder(ids).last_hidden_state
    expected = model.unet(latents, times, states).sample
    assert torch.equal(model(latents, times, input_ids=ids), expected)
    assert torch.equal(model(latents, times, encoder_hidden_states=states), expected)
    assert not torch.equal(model(latents, times, input_ids=ids.roll(1, 0)), expected)


@torch.no_grad()
def test_the_conditions_of_sdxl_reach_the_unet():
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    model = build(None, **added, projection_class_embeddings_input_dim=10 + 6 * 4)
    latents, times, _ = inputs()
    given = {"encoder_hidden_states": torch.randn(2, 6, 16), "text_embeds": torch.randn(2, 10)}
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    first, same, other = (
        model(latents, times, **given, time_ids=ids) for ids in (sizes, sizes, sizes + torch.eye(6)[2] * 32)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_frozen_text_encoder_gets_no_gradient():
    model = TextToImageModel(UNET, TEXT, train_text_encoder=False)
    latents, times, ids = inputs()
    model(latents, times, input_ids=ids).sum().backward()
    assert all(parameter.grad is None for parameter in model.text_encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.unet.parameters())


def test_sizes_that_are_not_given_are_stable_diffusions():
    with torch.device("meta"):
        whole = TextToImageModel({**filled_unet({}), "cross_attention_dim": 768}, filled_text_encoder({}))
    assert sum(p.numel() for p in whole.unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in whole.text_encoder.parameters()) == 123_060_480
    assert 0.40e12 < count_macs(whole, (64, 64)) < 0.42e12  # the UNet alone 0.402
    three = filled_unet({"block_out_channels": [32, 64, 64]})
    assert three["down_block_types"] == ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    assert three["up_block_types"] == ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TextToImageModel({**UNET, "blocks": 3}, TEXT), r"^unet_options: no UNet2DConditionModel .*blocks"),
        (lambda: TextToImageModel({**UNET, "layers_per_block": [1]}, TEXT), "^unet_options: no UNet2DConditionModel"),
        (
            lambda: TextToImageModel(UNET, {**TEXT, "depth": 2}),
            "^text_encoder_options: CLIPTextConfig has no .*'depth'",
        ),
        (lambda: TextToImageModel(UNET, {**TEXT, "num_attention_heads": 3}), "^text_encoder_options: no CLIPTextModel"),
        (lambda: build(cross_attention_dim=8), "cross_attention_dim is 8, and the text encoder's hidden_size 16"),
        (lambda: build()(*inputs()[:2]), "^input_ids: give input_ids or encoder_hidden_states"),
        (lambda: build(None)(*inputs()), "^input_ids: this model has no text encoder"),
    ],
    ids=["option", "levels", "text option", "heads", "width", "no words", "no encoder"],
)
def test_what_cannot_be_is_refused_in_a_line(make, said):
    with pytest.raises(InputError, match=said):
        make()
