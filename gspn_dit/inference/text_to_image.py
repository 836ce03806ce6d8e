"""A folder to a text-to-image pipeline of diffusers, with replacement layers in the place of its self-attention."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

from gspn_dit.autoencoder import downsampling, load_vae
from gspn_dit.autoencoder.vae import weights_sha256
from gspn_dit.errors import InputError, is_of_files
from gspn_dit.inference.prompts import TextToImagePipeline
from gspn_dit.models.attention_replacement import AttentionReplacement
from gspn_dit.registry import quoted
from gspn_dit.storage.packaged import PACKAGED_TEXT_TO_IMAGE
from gspn_dit.text.tokens import tokenizer_sha256

_INDEX = "model_index.json"  # of a saved pipeline, as diffusers calls it
_NOTES = ("architectures", "dtype", "torch_dtype", "transformers_version")  # in configurations, of who wrote them
_KINDS = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}


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
    about = {"argument": "replacement", "value": replacement}
    wanted = f"a folder that an {AttentionReplacement.__name__} was saved to"
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError("no readable config.json there", **about, wanted=wanted) from error
    if kind != AttentionReplacement.__name__:
        raise InputError(f"a {kind}", **about, wanted=wanted)
    return folder


def sha256_of_parts(pipe: TextToImagePipeline, model: str, replacement: str | None = None) -> dict[str, str]:
    """SHA-256 of all that images are drawn with, by what it is of: weights, configurations, tokenizers.

    They are of what the files hold: another place, or another version that wrote the same, does not show. The scheduler
    is left out, for it is a few numbers.

    Args:
        pipe: As :func:`load_text_to_image` gave it.
        model: Where it is from.
        replacement: The folder of the layers that are mounted on it.
    """
    folder = find_text_to_image(model)
    found = {"pipeline_config_sha256": _sha256_of(_config(folder / _INDEX))}
    layers: list[str] = []
    if replacement is not None:
        described = _config(find_replacement(replacement) / "config.json")["layers"]
        layers = [layer["name"] for layer in described]
        mounted = [pipe.unet.get_submodule(name) for name in layers]
        found |= {"replacement_config_sha256": _sha256_of(described), "replacement_sha256": weights_sha256(*mounted)}
    for name in ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker"):
        if (part := getattr(pipe, name, None)) is not None:
            found[f"{name}_config_sha256"] = _sha256_of(_config(folder / name / "config.json"))
            found[f"{name}_sha256"] = weights_sha256(part, without=layers if name == "unet" else ())
    for name in ("tokenizer", "tokenizer_2"):
        if (part := getattr(pipe, name, None)) is not None:
            found[f"{name}_sha256"] = tokenizer_sha256(part)
    return found


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
        # without the dtype: versions of diffusers differ in its name, and warn of the other
        pipe = kind.from_pretrained(str(folder), vae=vae, local_files_only=True)
    except Exception as error:
        if not is_of_files(error):
            raise
        raise _unreadable("model", model, error) from error
    _check(pipe, model)
    for name in ("unet", "text_encoder", "text_encoder_2", "safety_checker"):
        if (part := getattr(pipe, name, None)) is not None:
            nn.Module.to(part, dtype)  # diffusers' own warns of modules to keep in float32, also where there are none
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


def _config(path: Path) -> dict[str, Any]:
    """What a configuration says, but for who wrote it and in which dtype."""
    said = json.loads(path.read_text())
    return {key: value for key, value in said.items() if not key.startswith("_") and key not in _NOTES}


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
    except Exception as error:
        if not is_of_files(error):
            raise
        raise _unreadable("replacement", str(folder), error) from error


def _unreadable(argument: str, value: str, error: Exception) -> InputError:
    reason = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
    return InputError(f"its files cannot be read ({reason})", argument=argument, value=value, remedy="save them again")
