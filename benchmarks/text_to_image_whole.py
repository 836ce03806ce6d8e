"""SD-XL at random weights, and an image by what `gspn-dit generate` runs: for time and memory from a text to a file."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.commands import TextToImageOptions
from benchmarks.stable_diffusion import random_unet
from benchmarks.text_to_image_case import failure
from gspn_dit import replace_self_attention
from gspn_dit.inference.generate import Drawing, write_image
from gspn_dit.inference.prompts import TextToImagePipeline
from gspn_dit.inference.stages import Stage
from gspn_dit.inference.text_to_image import default_guidance_scale
from gspn_dit.storage.packaged import PACKAGED_TOKENIZERS
from gspn_dit.text.tokens import load_tokenizer

PROMPT = "a castle above a river, at night"
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
FIRST_ENCODER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
SECOND_ENCODER: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


def random_pipeline(options: TextToImageOptions) -> TextToImagePipeline:
    """SD-XL with all its parts at random weights on the device, its VAE in float32 as `gspn-dit generate` has it."""
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    tokenizer = load_tokenizer(next(iter(PACKAGED_TOKENIZERS.values())))
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }

    def encoder(kind: type, config: dict[str, Any]) -> nn.Module:
        return kind(CLIPTextConfig(vocab_size=len(tokenizer), **ends, **config)).to(dtype)

    with device:
        parts = {
            "vae": AutoencoderKL(**VAE),
            "text_encoder": encoder(CLIPTextModel, FIRST_ENCODER),
            "text_encoder_2": encoder(CLIPTextModelWithProjection, SECOND_ENCODER),
        }
    pipe = StableDiffusionXLPipeline(
        **{name: part.eval().requires_grad_(False) for name, part in parts.items()},
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=random_unet("SD-XL", options.device, dtype),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    replace_self_attention(pipe, seed=0).mount(pipe)
    return pipe


def generate(pipe: TextToImagePipeline, size: tuple[int, int], options: TextToImageOptions) -> dict[str, Any]:
    """Seconds and peak bytes of an image (height, width); what went wrong is a result too."""
    device = torch.device(options.device)
    stages = [Stage(*size, options.num_inference_steps)]
    drawing = Drawing(pipe, stages, default_guidance_scale(pipe), None, 0, options.memory)
    drawing.check_memory(1, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was taken to make weights
        torch.cuda.reset_peak_memory_stats()
    times = [time.perf_counter()]
    try:
        with TemporaryDirectory() as folder:
            (latents,) = drawing.draw(0, [0], [PROMPT], None, lambda: None)
            times.append(now(device))
            write_image(pipe, latents, Path(folder, "image.png"))
            times.append(now(device))
    except RuntimeError as error:
        return failure(error)
    figures: dict[str, Any] = {"drawing": times[1] - times[0], "decoding": times[2] - times[1]}
    if device.type == "cuda":
        figures |= {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return figures


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
