"""The UNets of Stable Diffusion at their real sizes, with random weights, or on the meta device without any."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._pytree import tree_map

SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {"SD 1.5": SD15, "SD-XL": SDXL}
FACTOR, TOKENS = 8, 77  # pixels a side of a latent; of a text


def unet_on_meta(name: str, dtype: torch.dtype = torch.bfloat16) -> UNet2DConditionModel:
    """One of UNETS, without weights."""
    return random_unet(name, "meta", dtype)


def random_unet(name: str, device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """One of UNETS, at random weights."""
    with torch.device(device):
        unet = UNet2DConditionModel(**UNETS[name])
    return torch.nn.Module.to(unet, dtype).eval().requires_grad_(False)


def inputs_on_meta(unet: UNet2DConditionModel, pixels: tuple[int, int], batch: int) -> dict[str, Any]:
    """What a call of the UNet takes for images (height, width)."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=unet.dtype, device="meta")

    inputs: dict[str, Any] = {
        "sample": empty(batch, unet.config.in_channels, *(side // FACTOR for side in pixels)),
        "timestep": torch.empty((), dtype=torch.int64, device="meta"),
        "encoder_hidden_states": empty(batch, TOKENS, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": empty(batch, pooled), "time_ids": empty(batch, 6)}
    return inputs


def random_inputs(unet: UNet2DConditionModel, pixels: tuple[int, int], batch: int) -> dict[str, Any]:
    """As :func:`inputs_on_meta`, with numbers, on the UNet's device."""

    def filled(like: Tensor) -> Tensor:
        if like.dtype.is_floating_point:
            return torch.randn(like.shape, dtype=like.dtype, device=unet.device)
        return torch.full(like.shape, 500, dtype=like.dtype, device=unet.device)

    return tree_map(filled, inputs_on_meta(unet, pixels, batch))
