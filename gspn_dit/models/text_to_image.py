"""A text-to-image model of Stable Diffusion's architecture: diffusers' UNet and, where it has one, its text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from gspn_dit.errors import InputError
from gspn_dit.models.saved_model import SavedModel

TEXT_ENCODER: dict[str, Any] = {  # of Stable Diffusion 1: CLIP ViT-L/14's
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}


class TextToImageModel(SavedModel):
    """Noisy latents and a caption to what is predicted of them.

    The parts are plain `UNet2DConditionModel` and `CLIPTextModel`, as `StableDiffusionPipeline` takes them. The text
    encoder may be missing: then hidden states of text are given.

    Args:
        unet_options: Options of the `UNet2DConditionModel`.
        text_encoder_options: Options of the `CLIPTextConfig` of a `CLIPTextModel`, over its defaults; None for none.
        train_text_encoder: Whether the text encoder's parameters are trained.

    Attributes:
        unet: The UNet.
        text_encoder: The text encoder, or None.

    Raises :class:`InputError` for options that make no such model, or if they do not fit one another.
    """

    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012 (as diffusers has it)

    @register_to_config
    def __init__(
        self,
        unet_options: dict[str, Any],
        text_encoder_options: dict[str, Any] | None = None,
        train_text_encoder: bool = True,
    ) -> None:
        super().__init__()
        try:
            self.unet = UNet2DConditionModel(**unet_options)
        except (TypeError, ValueError, NotImplementedError, ZeroDivisionError, IndexError) as error:
            raise InputError(
                f"no UNet2DConditionModel is made of these ({' '.join(str(error).split())})", argument="unet_options"
            ) from error
        self.text_encoder = None if text_encoder_options is None else text_encoder(text_encoder_options)
        if self.text_encoder is None:
            return
        self.text_encoder.requires_grad_(train_text_encoder)
        width, takes = self.text_encoder.config.hidden_size, self.unet.config.cross_attention_dim
        if takes != width:
            raise InputError(
                f"its cross_attention_dim is {takes}, and the text encoder's hidden_size {width}",
                argument="unet_options",
                remedy="make them the same",
            )

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        input_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """The prediction (B, C, h, w).

        Args:
            latents: Noisy latents (B, C, h, w).
            timesteps: (B,).
            input_ids: Tokens of the captions (B, L), for the model's own text encoder; or
            encoder_hidden_states: hidden states of text (B, L, D) in their place.
            text_embeds: Pooled embeddings of the captions, of SD-XL (B, P).
            time_ids: Sizes and crops of the images, of SD-XL (B, 6).

        Raises :class:`InputError` for both or neither of the two, or for tokens that no text encoder is there for.
        """
        if (input_ids is None) == (encoder_hidden_states is None):
            raise InputError("give input_ids or encoder_hidden_states, one of them", argument="input_ids")
        if input_ids is not None:
            if self.text_encoder is None:
                raise InputError("this model has no text encoder: give encoder_hidden_states", argument="input_ids")
            encoder_hidden_states = self.text_encoder(input_ids)[0]
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(
            latents,
            timesteps,
            encoder_hidden_states,
            added_cond_kwargs={name: tensor for name, tensor in added.items() if tensor is not None},
            return_dict=False,
        )[0]

    def example_inputs(self, size: tuple[int, int], condition: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The arguments of :meth:`forward` for one sample of latents of that height and width, on the model's device.

        The condition is the first token of a caption as often as it goes, unless another is given.
        """
        device, length = self.device, TEXT_ENCODER["max_position_embeddings"]
        if condition is None and self.text_encoder is not None:
            length = self.text_encoder.config.max_position_embeddings
            condition = {"input_ids": torch.zeros(1, length, dtype=torch.long, device=device)}
        elif condition is None:
            width = self.unet.config.cross_attention_dim
            condition = {"encoder_hidden_states": torch.zeros(1, length, width, device=device)}
        latents = torch.zeros(1, self.unet.config.in_channels, *size, device=device)
        return {"latents": latents, "timesteps": torch.zeros(1, device=device), **condition}


def text_encoder(options: Mapping[str, Any]) -> Any:
    """A CLIPTextModel of options. Raises :class:`InputError` for what no such model can be made of."""
    from transformers import CLIPTextConfig, CLIPTextModel

    known = CLIPTextConfig().to_dict()
    if odd := sorted(options.keys() - known.keys()):
        raise InputError(f"CLIPTextConfig has no option {odd[0]!r}", argument="text_encoder_options")
    try:
        return CLIPTextModel(CLIPTextConfig(**{**TEXT_ENCODER, **options}))
    except Exception as error:  # transformers 5 has kinds of its own, which its older versions do not have
        raise InputError(
            f"no CLIPTextModel is made of these ({' '.join(str(error).split())})", argument="text_encoder_options"
        ) from error


def filled_unet(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a UNet2DConditionModel, with block types as Stable Diffusion has them where none are given.

    Every level has cross-attention but the smallest map's.
    """
    options = dict(given)
    levels = len(options.get("block_out_channels", (0,) * 4))
    options.setdefault("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"])
    options.setdefault(
        "up_block_types",
        [name.replace("Down", "Up") for name in reversed(options["down_block_types"])],
    )
    return options


def filled_text_encoder(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a CLIPTextConfig: those of Stable Diffusion 1, in the proportions of its width where that is another.

    Heads have 64 channels, or there is one; the feed-forward layers are four times as wide.
    """
    width = given.get("hidden_size", TEXT_ENCODER["hidden_size"])
    derived = {
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_attention_heads": max(1, width // 64),
    }
    return {**TEXT_ENCODER, **derived, **given}
