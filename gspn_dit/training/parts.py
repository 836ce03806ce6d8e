"""What a run is made of, opened and checked before any step."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from diffusers import AutoencoderKL
from torch.distributed.fsdp import CPUOffloadPolicy

from gspn_dit.autoencoder import downsampling, load_vae
from gspn_dit.autoencoder.quality import (
    latent_statistics,
    psnr,
    reconstruction_error,
    warn_of_latents,
    warn_of_psnr,
)
from gspn_dit.autoencoder.vae import (
    adopt_normalisation,
    encode_moments,
    is_same_place,
    vae_record,
    vae_sha256,
)
from gspn_dit.conditioning import ClassLabels, Conditioning
from gspn_dit.config import Config
from gspn_dit.data.source import LatentSource, Source, is_of_latents
from gspn_dit.diffusion import Objective, create_objective, create_scheduler
from gspn_dit.diffusion.sampling import check_steps
from gspn_dit.errors import InputError, not_none, renamed
from gspn_dit.inference.loading import load_class_names, load_transformer
from gspn_dit.inference.pipeline import unguided
from gspn_dit.models import create_model
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.models.registry import NoSuchOption, find_preset
from gspn_dit.storage.run_folder import RunFolder
from gspn_dit.training.evaluator import Evaluator
from gspn_dit.training.latents import FromImages, FromMoments, LatentEncoder
from gspn_dit.training.stream import StepSampler, TrainingStream, open_source

logger = logging.getLogger(__name__)
OVERRIDES = "model.overrides."
STORED_LOOKED_AT, ENCODED_LOOKED_AT = 64, 4  # images, before training
LABELS = "y_embedder.embedding_table.weight"  # a row for each class and a last one for no class


@dataclass
class Run:
    """What a run is made of, the same at all its steps; what they change is its :class:`State`.

    Args:
        config: Its options.
        accelerator: What its processes share.
        source: The training data.
        stream: Its samples, in order.
        encoder: Makes clean latents of them.
        conditioning: What the condition of an image is.
        objective: What is learned.
        build: Makes another network of the same kind, on the default device.
        vae: The autoencoder, or None where there is nothing to encode or to draw.
        vae_record: What VAE the latents are of, for the checkpoints.
        evaluator: The quick score, or None for none.
    """

    config: Config
    accelerator: Accelerator
    source: Source
    stream: TrainingStream
    encoder: LatentEncoder
    conditioning: Conditioning
    objective: Objective
    build: Callable[[], LatentModel]
    vae: AutoencoderKL | None
    vae_record: dict[str, Any]
    evaluator: Evaluator | None


def open_run(config: Config, accelerator: Accelerator) -> tuple[Run, LatentModel]:
    """Open everything a configuration names, and make its network, freshly initialised, on the device.

    Raises :class:`InputError` for what cannot be.
    """
    with renamed(time_sampling="diffusion.time_sampling"):
        objective = create_objective(config.diffusion.objective, time_sampling=config.diffusion.time_sampling)
    with renamed(source="data.source", image_size="data.image_size", vae="data.vae"):
        source = open_source(config.data, config.seed)
    steps_from(0, config, accelerator)  # refuses a batch that does not split evenly
    with renamed(vae="data.vae"):
        vae, encoder, latent_shape, record = open_latents(config, source, accelerator.device)
    set_seed(config.seed)
    with renamed(name="model.name"):
        options = as_begun(config)
    build = partial(
        create_model,
        config.model.name,
        sample_size=latent_shape[1:],
        in_channels=latent_shape[0],
        out_channels=objective.out_channels(latent_shape[0]),
        num_classes=len(source.class_names),
        **options,
    )
    try:
        with renamed(OVERRIDES, name="model.name"):
            model = build().to(accelerator.device)
    except InputError as error:
        if error.argument == OVERRIDES + "sample_size":
            raise InputError(
                f"of its latents, {error.about('sample_size')}",
                argument="data.image_size",
                value=config.data.image_size,
            ) from error
        if isinstance(error, NoSuchOption):
            error.remedy = f"{error.remedy}; --model.overrides '{{}}' takes none of a file's"
        raise
    conditioning = ClassLabels(len(source.class_names), source.class_names)
    stream = TrainingStream(
        source,
        latent_shape=latent_shape,
        condition_names=conditioning.names,
        dropout=config.diffusion.class_dropout,
        horizontal_flip=config.data.horizontal_flip,
        seed=config.seed,
    )
    evaluator = Evaluator(config, accelerator, source.class_names) if config.evaluation.every else None
    run = Run(config, accelerator, source, stream, encoder, conditioning, objective, build, vae, record, evaluator)
    return run, model


def as_begun(config: Config) -> dict[str, Any]:
    """`model.overrides`, and the options of a run to resume whose defaults have changed since it began."""
    overrides, of_before = config.model.overrides, find_preset(config.model.name).family.of_before
    for checkpoint in reversed(RunFolder(Path(config.output_dir)).list_checkpoints()):
        try:
            saved = json.loads(checkpoint.ema_config.read_text())
        except (OSError, ValueError):  # it is damaged, which resuming says
            continue
        return {option: saved.get(option, meaning) for option, meaning in of_before.items()} | overrides
    return overrides


def steps_from(step: int, config: Config, accelerator: Accelerator) -> StepSampler:
    """Which samples this process takes at each of the steps after `step`.

    Raises :class:`InputError` for a batch that does not split evenly.
    """
    return StepSampler(
        step,
        config.training.max_steps,
        batch_size=config.training.batch_size,
        accumulation=config.training.gradient_accumulation_steps,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )


def start_from(model: LatentModel, path: str, class_names: list[str]) -> str | None:
    """Give a new model the averaged weights of a run, a checkpoint or an exported folder, of whatever image size.

    With another number of classes, a label's embedding is that of the class of the same name there, or new.

    Args:
        model: On which the weights are changed.
        path: Of the others.
        class_names: The model's.

    Returns:
        What became of the labels' embeddings, if the numbers of classes differ.

    Raises:
        InputError: If there are none, or they are another network's.
    """
    with renamed(model="model.init_from"):
        source = load_transformer(path)
    theirs, ours = (
        {name: p for name, p in each.named_parameters() if p.requires_grad}  # what is not trained goes with the size
        for each in (source, model)
    )
    for name in theirs | ours:
        found, wanted = (tuple(of[name].shape) if name in of else "not there" for of in (theirs, ours))
        if found != wanted and not (name == LABELS and found[1:] == wanted[1:]):
            raise InputError(
                f"its {name} is {found}, this model's {wanted}",
                argument="model.init_from",
                value=path,
                wanted="the same model.name, model.overrides and diffusion.objective",
            )
    their_table, our_table = theirs.pop(LABELS), ours.pop(LABELS)
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
        if their_table.shape == our_table.shape:
            our_table.copy_(their_table)
            return None
        our_table[-1] = their_table[-1]  # no class
        names = load_class_names(path) or []
        kept = [label for label, name in enumerate(class_names) if name in names]
        our_table[kept] = their_table[[names.index(class_names[label]) for label in kept]]
    before, now = len(their_table) - 1, len(our_table) - 1
    of_same_name = f"; {len(kept)} of the same name keep theirs" if kept else ""
    return f"{path} has {before} classes, the data {now}: new label rows for {now - len(kept)}{of_same_name}"


def check_options(config: Config) -> None:
    """Raise :class:`InputError` for what only a later part of the run would stumble over."""
    with renamed(sampler="sampling.sampler", num_inference_steps="sampling.num_inference_steps"):
        scheduler = create_scheduler(config.diffusion.objective, config.sampling.sampler)
        check_steps(scheduler, config.sampling.num_inference_steps)
    if (dropout := config.diffusion.class_dropout) in (0, 1):
        if config.evaluation.guidance_scale > 1:
            raise InputError(
                unguided(dropout),
                argument="evaluation.guidance_scale",
                value=config.evaluation.guidance_scale,
                remedy="give 1",
            )
        if config.sampling.guidance_scale > 1 and PartialState().is_main_process:
            logger.info(f"samples are drawn at guidance_scale 1: {unguided(dropout)}", extra={"stderr": True})
    if taken := sorted({"sample_size", "in_channels", "out_channels", "num_classes"} & config.model.overrides.keys()):
        raise InputError("the data and the objective set it", argument=OVERRIDES + taken[0], remedy="leave it out")
    if config.training.mixed_precision == "fp16" and PartialState().device.type == "cpu":
        raise InputError(
            "needs an accelerator",
            argument="training.mixed_precision",
            value="fp16",
            remedy="on the CPU use 'bf16' or 'no'",
        )
    trackers = [tracker.value for tracker in get_available_trackers()]
    for name in config.training.trackers:
        if name not in trackers:
            raise InputError(
                f"{name!r} is not installed here",
                argument="training.trackers",
                remedy=f"there are {', '.join(trackers)}",
            )


def check_launch(accelerator: Accelerator) -> None:
    """Raise :class:`InputError` for a way of sharing training that checkpoints and averages do not know."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            argument="distributed_type",
            value=accelerator.distributed_type.value,
            wanted="several processes as they are, or FSDP2",
        )
    if accelerator.distributed_type is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError(
            argument="fsdp_version",
            value=1,
            wanted="2",
            remedy="launch with --fsdp_version 2 or configs/accelerate/fsdp.yaml",
        )
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        if plugin.activation_checkpointing:  # accelerate's renames weights and drops other blocks when it goes back
            raise InputError(
                argument="fsdp_activation_checkpointing",
                value=True,
                wanted="false, and --training.gradient-checkpointing true instead",
            )
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise InputError(
                argument="fsdp_offload_params",
                value=True,
                wanted="false",
                remedy="averages and samples are for the GPUs' memory",
            )
    if accelerator.device.type == "mps":
        raise InputError(
            "lacks the float64 that training needs",
            argument="device",
            value="mps",
            remedy="set ACCELERATE_USE_CPU=true",
        )


Opened = tuple[AutoencoderKL | None, LatentEncoder, tuple[int, int, int], dict[str, Any]]


def open_latents(config: Config, source: Source, device: torch.device) -> Opened:
    """The VAE, what makes latents of the source's samples, their shape (C, h, w), and the record of their VAE.

    The VAE is None where there is nothing to encode or to draw. A few latents are looked at, and warned of.

    Raises :class:`InputError` for a VAE that did not make the source's latents, or does not take the image size.
    """
    if is_of_latents(source):
        return open_stored_latents(config, source, device)
    return open_encoded_images(config, source, device)


def open_stored_latents(config: Config, source: LatentSource, device: torch.device) -> Opened:
    """As :func:`open_latents`, where latents are stored."""
    drawn = bool(config.training.sample_every or config.evaluation.every)
    vae = open_vae_of(source, config, drawn)
    if drawn:
        adopt_normalisation(vae, source, config.data.source)
    count = min(STORED_LOOKED_AT, len(source))
    looked_at = torch.stack([source.sample(k * len(source) // count)["moments"] for k in range(count)])
    warn_of_latents(latent_statistics(source, [looked_at]), source)
    if (decibels := source.manifest.get("reconstruction_psnr")) is not None:
        warn_of_psnr(decibels)
    record = vae_record(config.data.vae, source, source.vae_sha256 if vae is None else vae)
    return not_none(vae).to(device) if drawn else None, FromMoments(source), source.latent_shape, record


def open_encoded_images(config: Config, source: Source, device: torch.device) -> Opened:
    """As :func:`open_latents`, where images are encoded as they come."""
    vae = load_vae(config.data.vae).to(device)
    side, rest = divmod(config.data.image_size, downsampling(vae))
    if rest:
        raise InputError(
            f"this VAE wants a multiple of {downsampling(vae)}",
            argument="data.image_size",
            value=config.data.image_size,
        )
    count = min(ENCODED_LOOKED_AT, len(source))
    images = [source.sample(k * len(source) // count)["image"][None] for k in range(count)]
    warn_of_latents(latent_statistics(vae.config, (encode_moments(vae, image) for image in images)), vae.config)
    warn_of_psnr(psnr(reconstruction_error(vae, images)))
    record = vae_record(config.data.vae, vae.config, vae)
    return vae, FromImages(vae), (vae.config.latent_channels, side, side), record


def open_vae_of(store: LatentSource, config: Config, drawn: bool) -> AutoencoderKL | None:
    """The VAE that `data.vae` names, if it is to draw or to be compared with the one that made a store.

    A store that says what its VAE's weights are takes that VAE by any name; a decoder trained further is as good.

    Raises :class:`InputError` if it is another.
    """
    same_place = is_same_place(store.vae, config.data.vae)
    if store.vae_sha256 is None:
        if not same_place:
            raise InputError(
                f"{config.data.source} was encoded by {store.vae!r}, and was so before stores noted what that is",
                argument="data.vae",
                value=config.data.vae,
                remedy=(
                    "if this is the same VAE in another place, write its name for `vae` into the store's "
                    "manifest.json and encode.json"
                ),
            )
        return load_vae(config.data.vae) if drawn else None
    if same_place and not drawn:
        return None
    vae = load_vae(config.data.vae)
    if vae_sha256(vae)["encoder"] != store.vae_sha256["encoder"]:
        raise InputError(
            f"its weights are not those that {config.data.source} was encoded with, of {store.vae!r}",
            argument="data.vae",
            value=config.data.vae,
            remedy="name that VAE, wherever it lies, or encode anew",
        )
    return vae
