"""A folder to a text-to-image pipeline of diffusers, with replacement layers in the place of its self-attention."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from gspn_dit.autoencoder import downsampling, load_vae
from gspn_dit.errors import InputError, machine_fault
from gspn_dit.inference.prompts import TextToImagePipeline
from gspn_dit.models.attention_replacement import AttentionReplacement
from gspn_dit.registry import quoted
from gspn_dit.storage.packaged import PACKAGED_TEXT_TO_IMAGE

_INDEX = "model_index.json"  # of a saved pipeline, as diffusers calls it
_KINDS = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
_DAMAGE = (OSError, ValueError, LookupError, AttributeError, RuntimeError, TypeError, SafetensorError)


def find_text_to_image(model: str) -> Path:
    """The folder of a saved Stable Diffusion pipeline: a packaged model's, a folder, or one in the hub's cache.

    Nothing is downloaded. Raises :class:`InputError` if there is none, or it is of another kind.
    """
    folder = PACKAGED_TEXT_TO_IMAGE.get(model, Path(model))
    if not folder.is_dir():
        folder = _in_hub_cache(model)
    index = folder / _INDEX
    try:
        kind = json.loads(index.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"no readable {_INDEX} there",
            argument="model",
            value=model,
            wanted="a folder that a diffusers pipeline was saved to",
        ) from error
    if kind not in _KINDS:
        raise InputError(f"a {kind}", argument="model", value=model, wanted=" or ".join(_KINDS))
    return folder


def find_replacement(replacement: str) -> Path:
    """The folder of saved replacement layers. Raises :class:`InputError` if it is none."""
    folder = Path(replacement)
    if not (folder / "config.json").is_file():
        raise InputError(
            "no config.json there",
            argument="replacement",
            value=replacement,
            wanted="a folder that an AttentionReplacement was saved to",
        )
    return folder


def described_layers(replacement: str) -> list[dict[str, Any]]:
    """What the configuration in a folder of replacement layers says of each, such as its chunk, which is no weight."""
    return json.loads((find_replacement(replacement) / "config.json").read_text())["layers"]


def load_text_to_image(
    model: str, replacement: str | None = None, dtype: torch.dtype = torch.float32
) -> TextToImagePipeline:
    """The pipeline, its UNet and text encoders in a dtype and its VAE in float32, as SD-XL's must be.

    Args:
        model: As :func:`find_text_to_image`.
        replacement: The folder of an :class:`~gspn_dit.models.attention_replacement.AttentionReplacement` to mount.
        dtype: Of the UNet, the replacement and the text encoders.

    Raises :class:`InputError` if files cannot be read, or parts do not fit each other.
    """
    folder = find_text_to_image(model)
    kind = _KINDS[json.loads((folder / _INDEX).read_text())["_class_name"]]
    layers = None if replacement is None else find_replacement(replacement)
    vae = load_vae(folder / "vae")
    try:
        pipe = kind.from_pretrained(str(folder), vae=vae, torch_dtype=dtype, local_files_only=True)
    except _DAMAGE as error:
        if machine_fault(error) is not None:
            raise
        raise _unreadable("model", model, error) from error
    _check(pipe, model)
    if layers is not None:
        _mount(pipe, layers)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.eval().requires_grad_(False)
    return pipe


def default_guidance_scale(pipe: TextToImagePipeline) -> float:
    """What diffusers takes for such a pipeline."""
    return inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default


def default_size(pipe: TextToImagePipeline) -> tuple[int, int]:
    """Height and width in pixels that the UNet was made for."""
    size, factor = pipe.unet.config.sample_size, downsampling(pipe.vae)
    height, width = (size, size) if isinstance(size, int) else size
    return height * factor, width * factor


def _in_hub_cache(model: str) -> Path:
    try:
        index = try_to_load_from_cache(model, _INDEX)
    except HFValidationError:
        index = None
    if isinstance(index, str):
        return Path(index).parent
    packaged = f", or a packaged model: {quoted(PACKAGED_TEXT_TO_IMAGE)}" if PACKAGED_TEXT_TO_IMAGE else ""
    raise InputError(
        "no such folder, and no model of that name in the hub's cache",
        argument="model",
        value=model,
        wanted=f"a folder that a diffusers pipeline was saved to{packaged}",
    )


def _check(pipe: TextToImagePipeline, model: str) -> None:
    """Raise :class:`InputError` for a UNet that needs more than latents, a time and a text."""
    config, latents = pipe.unet.config, pipe.vae.config.latent_channels
    if config.in_channels != latents:
        raise InputError(
            f"its UNet takes {config.in_channels} channels, and its latents have {latents}",
            argument="model",
            value=model,
            wanted="a UNet of text-to-image, not one of inpainting or of editing",
        )
    if config.sample_size is None:
        raise InputError(
            "its UNet does not say the size that it was made for",
            argument="model",
            value=model,
            remedy="write sample_size, in latents, to unet/config.json",
        )
    if config.time_cond_proj_dim is not None:
        raise InputError(
            "its UNet is told the guidance scale", argument="model", value=model, wanted="one that is guided as usual"
        )


def _mount(pipe: TextToImagePipeline, folder: Path) -> None:
    try:
        AttentionReplacement.from_pretrained(folder).mount(pipe)
    except InputError as error:
        raise InputError(str(error), argument="replacement", value=str(folder)) from error
    except _DAMAGE as error:
        if machine_fault(error) is not None:
            raise
        raise _unreadable("replacement", str(folder), error) from error


def _unreadable(argument: str, value: str, error: Exception) -> InputError:
    reason = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
    return InputError(f"its files cannot be read ({reason})", argument=argument, value=value, remedy="save them again")
