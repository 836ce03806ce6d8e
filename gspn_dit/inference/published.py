"""Published weights of DiT and SiT to a pipeline that draws as their authors' code does.

Weights alone, of :mod:`gspn_dit.models.published`, get a VAE by name, the sampler of their objective, and the guidance
and steps of DiT's and SiT's sampling scripts. A folder of diffusers' DiTPipeline, such as `facebook/DiT-XL-2-256`, has
a VAE, a scheduler and classes' names of its own.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from gspn_dit.autoencoder import load_vae
from gspn_dit.diffusion import create_scheduler
from gspn_dit.errors import InputError
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.models.dit import DiT
from gspn_dit.models.published import HUB_OPTIONS, is_diffusers_folder

logger = logging.getLogger(__name__)

INDEX = "model_index.json"  # of a saved pipeline, as diffusers calls it
VAE = "stabilityai/sd-vae-ft-ema"  # whose encoder DiT and SiT were trained with
GUIDANCE_SCALE = 4.0  # of the scripts, and of DiTPipeline
GUIDED_CHANNELS = 3  # of the scripts, whose networks take and give four; DiTPipeline guides all
STEPS, PIPELINE_STEPS = 250, 50  # of the scripts; of DiTPipeline


def is_weights(place: str | os.PathLike) -> bool:
    """Whether that is a file, or a folder of a DiT of diffusers, without the rest of a pipeline."""
    return os.path.isfile(place) or is_diffusers_folder(Path(place))


def is_published(place: Path) -> bool:
    """Whether a file or a folder is of another project's format."""
    return is_weights(place) or ((place / INDEX).is_file() and is_dit_pipeline(json.loads((place / INDEX).read_text())))


def is_dit_pipeline(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json is that of diffusers' DiTPipeline."""
    return index.get("_class_name") == "DiTPipeline"


def pipeline_of_weights(
    place: str | os.PathLike,
    *,
    vae: AutoencoderKL | str | None = None,
    convention: str | None = None,
    torch_dtype: torch.dtype | None = None,
    **options: Any,
) -> GSPNDiTPipeline:
    """The pipeline of weights alone.

    Args:
        place: What :func:`is_weights` is true of.
        vae: The VAE, its folder or its hub name; :data:`VAE` if not given.
        convention: Of a file that does not say it, as :func:`~gspn_dit.models.published.of_file` has it.
        torch_dtype: Of the network, float32 if not given.
        options: Of the pipeline, as its constructor has them.

    Raises :class:`InputError` if it is no DiT and no SiT, or the VAE cannot be had.
    """
    of_file = {} if convention is None else {"convention": convention}
    transformer = DiT.from_pretrained(place, torch_dtype=torch_dtype or torch.float32, **of_file)
    if vae is None:
        logger.info(f"{os.fspath(place)}: no VAE with it, {VAE} decodes", extra={"stderr": True})
    try:
        decoder = vae if isinstance(vae, AutoencoderKL) else load_vae(vae or VAE)
    except InputError as error:
        if vae is not None:
            raise
        raise InputError(f"there is no VAE with it, and {error}", remedy="name one with --vae") from error
    config = transformer.config
    scheduler = create_scheduler("flow" if config.out_channels == config.in_channels else "ddpm")
    defaults: dict[str, Any] = {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": STEPS}
    if os.path.isfile(place):
        defaults["guided_channels"] = min(GUIDED_CHANNELS, config.in_channels)
    return GSPNDiTPipeline(transformer, decoder, scheduler, **{**defaults, **options})


def pipeline_parts(path: str | os.PathLike, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a DiTPipeline's folder or repository says otherwise than one of this package; of another folder, nothing.

    Args:
        path: The folder or hub name.
        given: The arguments of `from_pretrained`, of which none is changed.

    Raises :class:`InputError` if its transformer is no DiT; OSError if there is no such folder.
    """
    hub = {name: given[name] for name in HUB_OPTIONS if name in given}
    index = GSPNDiTPipeline.load_config(path, **hub)
    if not is_dit_pipeline(index):
        return {}
    parts: dict[str, Any] = {
        "class_names": class_names(index),
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": PIPELINE_STEPS,
    }
    if "transformer" not in given:
        same = {name: given[name] for name in ("torch_dtype", "use_safetensors", "variant") if name in given}
        parts["transformer"] = DiT.from_pretrained(path, subfolder="transformer", **hub, **same)
    return {name: part for name, part in parts.items() if name not in given}


def class_names(index: Mapping[str, Any]) -> list[str] | None:
    """The classes' names by id, of a saved pipeline's model_index.json; None if it has none.

    A DiTPipeline has all words for a class with commas between them. The first is its name, unless other classes have
    the same first one: then all are.
    """
    if not is_dit_pipeline(index):
        return index.get("class_names")
    words = {int(number): str(words) for number, words in (index.get("id2label") or {}).items()}
    if sorted(words) != list(range(len(words))):
        return None
    firsts = [words[number].split(",")[0].strip() for number in range(len(words))]
    return [first if firsts.count(first) == 1 else words[n] for n, first in enumerate(firsts)] or None
