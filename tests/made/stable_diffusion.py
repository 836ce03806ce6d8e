"""Pipelines of Stable Diffusion's architecture, built by hand at small sizes with random weights: no hub, no files."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_WIDTH = 32
TOKENS = 77


def tiny_sd(seed=0, **config):
    """A UNet of SD 1.x: three levels, 1×1 convolutions as projections, 7 self-attentions.

    Maps of its levels: the latents' size (32 channels, 4 heads), half of it (64 channels, 4 heads), and the mid block
    at a quarter. `config` overrides: `in_channels=9` for inpainting, SD 2.x as :func:`tiny_sd2`.
    """
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": TEXT_WIDTH,
            "attention_head_dim": 4,
            **config,
        }
    ).eval()


def tiny_sd2(seed=0, **config):
    """A UNet of SD 2.x: linear projections, heads by level."""
    return tiny_sd(seed, **{"attention_head_dim": (2, 4, 8), "use_linear_projection": True, **config})


def tiny_sdxl(seed=0, **config):
    """A UNet of SD-XL: no attention at the first level, several layers in a transformer, sizes as a condition."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (32, 64, 96),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 1, 2),
            "norm_num_groups": 8,
            "cross_attention_dim": 2 * TEXT_WIDTH,
            "attention_head_dim": (2, 4, 6),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,
            **config,
        }
    ).eval()


def tiny_vae():
    """An autoencoder with 4 channels and half the side, as SD's has an eighth."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    ).eval()


def tiny_tokenizer():
    """A CLIP tokenizer without merges: every byte is a token, and 77 of them a text."""
    with TemporaryDirectory() as folder:
        symbols = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)])]
        ends = ["<|startoftext|>", "<|endoftext|>"]
        vocabulary = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *ends]
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def tiny_text_encoder(tokenizer, projects=False, seed=2):
    """A CLIP text model of two layers for the tokenizer; with a projection as SD-XL's second has one."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


def tiny_controlnet(unet):
    """A ControlNet for the UNet, whose pictures have twice the latents' side."""
    torch.manual_seed(3)
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval()


def tiny_sd_pipeline(folder=None, unet=None, prediction_type="epsilon"):
    """A pipeline of SD 1.x, or 2.x with its UNet and `v_prediction`; with a folder, saved there and loaded from it."""
    tokenizer = tiny_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet or tiny_sd(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return by_folder(pipeline, folder)


def tiny_sdxl_pipeline(folder=None, unet=None):
    """A pipeline of SD-XL; with a folder, saved there and loaded from it."""
    tokenizer = tiny_tokenizer()
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        text_encoder_2=tiny_text_encoder(tokenizer, projects=True, seed=4),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=unet or tiny_sdxl(),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    return by_folder(pipeline, folder)


def by_folder(pipeline, folder):
    """The pipeline without progress bars; with a folder, as it is after a visit there."""
    if folder is not None:
        pipeline.save_pretrained(folder)
        pipeline = type(pipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(unet, height=16, width=16, batch=2, seed=0):
    """What the UNet is called with: latents, times and texts, and SD-XL's pooled texts and sizes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "sample": torch.randn(batch, unet.config.in_channels, height, width, generator=generator),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, TOKENS, unet.config.cross_attention_dim, generator=generator),
    }
    if unet.config.addition_embed_type == "text_time":
        size = torch.tensor([float(2 * height), 2 * width, 0, 0, 2 * height, 2 * width])
        pooled = torch.randn(batch, TEXT_WIDTH, generator=generator)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": size.expand(batch, -1)}
    return inputs


def stirred(replacement):
    """The replacement with weights away from their start, where some have no effect yet."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in replacement.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return replacement
