"""Images to latents and back, through any diffusers AutoencoderKL."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from diffusers.utils import is_accelerate_available
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import Tensor, nn

from gspn_dit.errors import InputError, is_finite, not_none, warn
from gspn_dit.registry import quoted
from gspn_dit.storage.packaged import PACKAGED_VAES

NORMALISATION = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
NOT_HEEDED = {"latents_mean": None, "latents_std": None}  # in runs and exports of before they were in a record
_HUB_TIMEOUT = 10  # seconds


class LatentScaling(Protocol):
    """What brings latents to unit variance: `vae.config`, or a :class:`~gspn_dit.data.latent_store.LatentStore`.

    Of `shift_factor`, one number, and `latents_mean` and `latents_std`, one per channel, at most one kind is not None.
    """

    scaling_factor: float
    shift_factor: float | None
    latents_mean: list[float] | None
    latents_std: list[float] | None


def load_vae(name_or_folder: str | os.PathLike, *, local_files_only: bool = False) -> AutoencoderKL:
    """An AutoencoderKL of RGB images in float32, in eval mode, without gradients.

    Args:
        name_or_folder: `digits` or `photos` (the packaged ones), a local diffusers folder, or a hub name.
        local_files_only: Ask the hub for nothing; what its cache here has, is taken.

    Raises:
        InputError: If there is no such VAE, the hub cannot be reached, the folder holds something else, or the VAE is
            one that :func:`check_vae` refuses.
    """
    name = str(name_or_folder)
    source = PACKAGED_VAES.get(name, Path(name_or_folder))
    remedy = (
        f"give {quoted(PACKAGED_VAES)}, a folder with an AutoencoderKL's config.json and weights, or a hub name that "
        "can be reached"
    )
    options: dict[str, Any] = {"low_cpu_mem_usage": is_accelerate_available()}  # which asks for accelerate, loudly
    if source.is_dir():
        _check_folder(source, remedy)
    else:
        options["local_files_only"] = local_files_only or not is_on_hub(name, remedy)
    try:
        vae = AutoencoderKL.from_pretrained(str(source), **options)
        nn.Module.to(vae, torch.float32)  # diffusers' own warns of modules to keep in float32: there are none
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(reason, argument="vae", value=name, remedy=remedy) from error
    check_vae(vae, name)
    return vae.eval().requires_grad_(False)


def check_vae(vae: AutoencoderKL, name: str) -> None:
    """Raise :class:`InputError` for a VAE that does not take and give RGB, or does not say how to scale its latents."""
    config = vae.config
    if (config.in_channels, config.out_channels) != (3, 3):
        raise InputError(
            f"takes {config.in_channels} channels and gives {config.out_channels}",
            argument="vae",
            value=name,
            wanted="a VAE of RGB images, 3 and 3",
        )
    scale, shift, mean, std = (getattr(config, key, None) for key in NORMALISATION)
    if not (is_finite(scale) and scale > 0):
        raise InputError(
            f"scaling_factor={scale!r} in its config.json", argument="vae", value=name, wanted="a number above 0"
        )
    if shift is not None and not is_finite(shift):
        raise InputError(
            f"shift_factor={shift!r} in its config.json", argument="vae", value=name, wanted="a number or null"
        )
    if mean is None and std is None:
        return
    for key, values in (("latents_mean", mean), ("latents_std", std)):
        if (
            not isinstance(values, list | tuple)
            or len(values) != config.latent_channels
            or not all(map(is_finite, values))
            or (key == "latents_std" and min(values) <= 0)
        ):
            raise InputError(
                f"{key}={values!r} in its config.json",
                argument="vae",
                value=name,
                wanted=(
                    f"{config.latent_channels} numbers, one a latent channel (latents_std above 0), or null "
                    "for both latents_mean and latents_std"
                ),
            )
    if shift:
        raise InputError(
            "its config.json has both shift_factor and latents_mean",
            argument="vae",
            value=name,
            wanted="one of them, the other null",
        )


def normalisation(scaling: LatentScaling) -> dict[str, Any]:
    """The numbers that bring latents to unit variance, for JSON; what there is not is None."""
    values = {key: getattr(scaling, key, None) for key in NORMALISATION}
    return {key: list(value) if isinstance(value, tuple) else value or None for key, value in values.items()}


def adopt_normalisation(vae: AutoencoderKL, scaling: LatentScaling | dict[str, Any], whose: str) -> None:
    """Decode latents as they were made: give a VAE their normalisation, and say so if its own is another."""
    wanted = scaling if isinstance(scaling, dict) else normalisation(scaling)
    own = normalisation(vae.config)
    if differing := [key for key in NORMALISATION if own[key] != wanted[key]]:
        vae.register_to_config(**{key: wanted[key] for key in NORMALISATION})
        changes = ", ".join(f"{key} {wanted[key]} (its config.json has {own[key]})" for key in differing)
        warn(f"latents of {whose} are decoded as they were made, with {changes}")


def vae_record(name: str, scaling: LatentScaling, vae: AutoencoderKL | dict[str, str] | None) -> dict[str, Any]:
    """What a checkpoint notes of the VAE of its latents: its name, its weights' SHA-256 and the normalisation."""
    sha256 = vae_sha256(vae) if isinstance(vae, AutoencoderKL) else vae
    return {"name": name, "sha256": sha256, **normalisation(scaling)}


def is_same_place(a: str, b: str) -> bool:
    """Whether two names of VAEs are one name or one folder."""
    return a == b or (os.path.isdir(a) and os.path.isdir(b) and os.path.samefile(a, b))


def vae_sha256(vae: AutoencoderKL) -> dict[str, str]:
    """What a VAE is, wherever it lies and whatever it is called: SHA-256 of its encoder's and its decoder's weights.

    The encoder alone decides what latents are: VAEs whose decoder was trained further share them.
    """
    return {
        "encoder": weights_sha256(*filter(None, (vae.encoder, vae.quant_conv))),
        "decoder": weights_sha256(*filter(None, (vae.post_quant_conv, vae.decoder))),
    }


def weights_sha256(*modules: nn.Module, without: Iterable[str] = ()) -> str:
    """SHA-256 of modules' parameters and buffers, with their names, in hexadecimal: what tells two models apart.

    Args:
        modules: The modules.
        without: Names of modules within each whose parameters and buffers do not count.
    """
    digest, left_out = hashlib.sha256(), tuple(f"{name}." for name in without)
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            if name.startswith(left_out):
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def downsampling(vae: AutoencoderKL) -> int:
    """How many pixels a side one latent stands for: 8 for Stable Diffusion's VAEs, 4 for the packaged ones."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The posterior of images: its mean and log-variance, stacked on the channel axis.

    Args:
        images: uint8 (B, 3, H, W), on any device.

    Returns:
        float32 (B, 2C, H/f, W/f) on the VAE's device, not yet shifted or scaled.
    """
    pixels = images.to(vae.device, vae.dtype) / 127.5 - 1
    posterior = vae.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1).float()


def sample_posterior(scaling: LatentScaling, moments: Tensor, noise: Tensor) -> Tensor:
    """Normalised latents of about unit variance, which the diffusion model learns.

    They are (mean + std·noise - shift)·scale, as diffusers has it for Stable Diffusion 3, or, with numbers for each
    channel, (mean + std·noise - latents_mean)·scale / latents_std, as for SD-XL.

    Args:
        scaling: `vae.config` or a latent store.
        moments: (…, 2C, h, w) from :func:`encode_moments` or a store.
        noise: (…, C, h, w) standard normal; zeros give the posterior's mean.
    """
    mean, logvar = moments.chunk(2, dim=-3)
    latents = mean + torch.exp(0.5 * logvar) * noise
    if scaling.latents_mean is not None:
        centre, spread = channels(scaling, latents)
        return (latents - centre) * scaling.scaling_factor / spread
    return (latents - (scaling.shift_factor or 0.0)) * scaling.scaling_factor


def unscale(scaling: LatentScaling, latents: Tensor) -> Tensor:
    """What the VAE gave, and takes, of normalised latents (…, C, h, w): undoes the scaling of posterior samples."""
    if scaling.latents_mean is not None:
        centre, spread = channels(scaling, latents)
        return latents * spread / scaling.scaling_factor + centre
    return latents / scaling.scaling_factor + (scaling.shift_factor or 0.0)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images uint8 (B, 3, H, W) of normalised latents (B, C, h, w), scaled as :func:`sample_posterior` does."""
    latents = latents.to(vae.device, vae.dtype)
    pixels = vae.decode(unscale(vae.config, latents)).sample.float()
    return pixels.add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)  # in place: a large image is large


def channels(scaling: LatentScaling, latents: Tensor) -> tuple[Tensor, Tensor]:
    """latents_mean and latents_std, (C, 1, 1) each."""
    mean, std = (tuple(not_none(values)) for values in (scaling.latents_mean, scaling.latents_std))
    return _column(mean, latents.device, latents.dtype), _column(std, latents.device, latents.dtype)


@cache
def _column(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


def is_on_hub(name: str, remedy: str, *, file: str = "config.json", argument: str = "vae") -> bool:
    """Whether the hub can be asked for what has that name; else only its cache here can.

    Args:
        name: OWNER/NAME.
        remedy: What to do instead, for the error.
        file: What the repository must have.
        argument: The option that names it.

    Raises:
        InputError: At once for what can be no hub's name; if the hub has no such repository, or can neither be reached
            nor was asked before.
    """
    try:
        validate_repo_id(name)
        no_hub_name = "/" not in name
    except HFValidationError:
        no_hub_name = True
    if no_hub_name:
        raise InputError(
            "no such folder, and no hub name, which is OWNER/NAME", argument=argument, value=name, remedy=remedy
        )
    try:  # one request, where from_pretrained would repeat it for half a minute
        get_hf_file_metadata(hf_hub_url(name, file), timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        reason = "no such folder, and the hub has no such repository, or none that you may read"
        raise InputError(reason, argument=argument, value=name, remedy=remedy) from error
    except EntryNotFoundError as error:
        raise InputError(f"that repository has no {file}", argument=argument, value=name, remedy=remedy) from error
    except Exception as error:  # no network, no name service, no answer, offline: every library has its own
        cached = try_to_load_from_cache(name, file)
        if not isinstance(cached, str):
            reason = f"no such folder, and the hub cannot be reached ({' '.join(str(error).split())[:120]})"
            raise InputError(reason, argument=argument, value=name, remedy=remedy) from error
        return False
    return True


def _check_folder(folder: Path, remedy: str) -> None:
    """diffusers would build a VAE of defaults from another model's config: refuse it here."""
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError) as error:
        raise InputError("no readable config.json there", argument="vae", value=str(folder), remedy=remedy) from error
    if kind != "AutoencoderKL":
        raise InputError(f"config.json is of {kind!r}", argument="vae", value=str(folder), remedy=remedy)
