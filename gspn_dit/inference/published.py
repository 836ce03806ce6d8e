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
from diffusers import AutoencoderKL, SchedulerMixin
from torch import nn

from gspn_dit.autoencoder import load_vae
from gspn_dit.autoencoder.vae import adopt_normalisation
from gspn_dit.diffusion import create_scheduler
from gspn_dit.errors import InputError, machine_fault
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.models.dit import DiT
from gspn_dit.models.published import HUB_OPTIONS, is_diffusers_folder

logger = logging.getLogger(__name__)

INDEX = "model_index.json"  # of a saved pipeline, as diffusers calls it
VAE = "stabilityai/sd-vae-ft-ema"  # whose encoder DiT and SiT were trained with
SCALING = {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None}  # in their code
GUIDANCE_SCALE = 4.0  # of the scripts, and of DiTPipeline
GUIDED_CHANNELS = 3  # of the scripts, whose networks take and give four; DiTPipeline guides all
STEPS, PIPELINE_STEPS = 250, 50  # of the scripts; of DiTPipeline
_OF_DOWNLOADS = (*HUB_OPTIONS, "use_safetensors", "variant", "low_cpu_mem_usage")


def is_weights(place: str | os.PathLike) -> bool:
    """Whether that is a file, or a folder of a DiT of diffusers, without the rest of a pipeline."""
    return os.path.isfile(place) or is_diffusers_folder(Path(place))


def is_published(place: Path) -> bool:
    """Whether a file or a folder is of another project's format."""
    return is_weights(place) or ((place / INDEX).is_file() and is_dit_pipeline(read_index(place)))


def read_index(folder: Path) -> dict[str, Any]:
    """A saved pipeline's model_index.json. Raises :class:`InputError` if it is damaged, or another's pipeline."""
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        if machine_fault(error) is not None:
            raise
        index = None
    if not isinstance(index, dict):
        raise InputError(f"its {INDEX} cannot be read", remedy="download it again")
    check_index(index)
    return index


def check_index(index: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` for the model_index.json of a pipeline that is neither of this package nor of a DiT."""
    found = index.get("_class_name")
    if found is not None and find_pipeline(found) is None and not is_dit_pipeline(index):
        raise InputError(f"it is a {found}", wanted=f"a {GSPNDiTPipeline.__name__}, or a DiTPipeline of diffusers")


def find_pipeline(name: object) -> type[GSPNDiTPipeline] | None:
    """The pipeline of this package, or the class derived from it, that has this name."""
    kinds = [GSPNDiTPipeline]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return next((kind for kind in kinds if kind.__name__ == name), None)


def is_dit_pipeline(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json is that of diffusers' DiTPipeline."""
    return index.get("_class_name") == "DiTPipeline"


def pipeline_of_weights(
    place: str | os.PathLike,
    *,
    vae: AutoencoderKL | str | None = None,
    scheduler: SchedulerMixin | None = None,
    convention: str | None = None,
    torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    called: str | os.PathLike | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> GSPNDiTPipeline:
    """The pipeline of weights alone.

    Args:
        place: What :func:`is_weights` is true of.
        vae: The VAE, its folder or its hub name; :data:`VAE` if not given. Latents are scaled as in the code of DiT and
            SiT, whatever its config says.
        scheduler: One for the weights' objective, if not that objective's usual one.
        convention: Of a file that does not say it, as :func:`~gspn_dit.models.published.of_file` has it.
        torch_dtype: Of the network, float32 if not given; or by the parts' names, as diffusers' pipelines take it.
        dtype: What newer versions of diffusers call it.
        called: What lines that say what is taken call it, if not `place`.
        local_files_only: Whether a VAE by name is looked for in the hub's cache alone.
        options: Of the pipeline, as its constructor has them. Those for a download of the weights do nothing.

    Raises :class:`InputError` if it is no DiT and no SiT, or the VAE cannot be had.
    """
    of_file = {} if convention is None else {"convention": convention}
    dtypes = dtype or torch_dtype
    transformer = DiT.from_pretrained(place, torch_dtype=dtype_of("transformer", dtypes), called=called, **of_file)
    if vae is None:
        logger.info(f"{os.fspath(called or place)}: no VAE with it, {VAE} decodes", extra={"stderr": True})
    try:
        decoder = vae if isinstance(vae, AutoencoderKL) else load_vae(vae or VAE, local_files_only=local_files_only)
    except InputError as error:
        if vae is not None:
            raise
        raise InputError(f"there is no VAE with it, and {error}", remedy="name one with --vae") from error
    adopt_normalisation(decoder, SCALING, "DiT and SiT")
    if isinstance(dtypes, Mapping):
        nn.Module.to(decoder, dtype_of("vae", dtypes))
    config = transformer.config
    if scheduler is None:
        scheduler = create_scheduler("flow" if config.out_channels == config.in_channels else "ddpm")
    defaults: dict[str, Any] = {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": STEPS}
    if os.path.isfile(place):
        defaults["guided_channels"] = min(GUIDED_CHANNELS, config.in_channels)
    options = {name: value for name, value in options.items() if name not in _OF_DOWNLOADS}
    return GSPNDiTPipeline(transformer, decoder, scheduler, **{**defaults, **options})


def dtype_of(part: str, dtype: torch.dtype | Mapping[str, torch.dtype] | None) -> torch.dtype:
    """The dtype of a part of a pipeline, as diffusers' `from_pretrained` takes it: one, or one by each part's name."""
    if isinstance(dtype, Mapping):
        return dtype.get(part, dtype.get("default", torch.float32))
    return dtype or torch.float32


def pipeline_parts(path: str | os.PathLike, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a DiTPipeline's folder or repository says otherwise than one of this package; of another folder, nothing.

    Args:
        path: The folder or hub name.
        given: The arguments of `from_pretrained`, of which none is changed.

    Raises :class:`InputError` if it is another project's pipeline, or its transformer is no DiT; OSError if there is no
    such folder.
    """
    if given.get("convention") is not None:
        raise InputError("only a file of weights leaves it open", argument="convention", value=given["convention"])
    hub = {name: given[name] for name in HUB_OPTIONS if name in given}
    if (Path(path) / INDEX).is_file():
        index = read_index(Path(path))
    else:
        index = GSPNDiTPipeline.load_config(path, **hub)
        check_index(index)
    if not is_dit_pipeline(index):
        return {}
    parts: dict[str, Any] = {
        "class_names": class_names(index),
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": PIPELINE_STEPS,
    }
    if "transformer" not in given:
        same = {name: given[name] for name in ("use_safetensors", "variant") if name in given}
        dtype = dtype_of("transformer", given.get("dtype") or given.get("torch_dtype"))
        parts["transformer"] = DiT.from_pretrained(path, subfolder="transformer", torch_dtype=dtype, **hub, **same)
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
