"""The training of a latent diffusion transformer: what it is made of, opened and checked before any step."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch import Tensor, nn

from gspn_dit.autoencoder import downsampling, load_vae
from gspn_dit.autoencoder.quality import (
    latent_statistics,
    psnr,
    reconstruction_error,
    warn_of_latents,
    warn_of_psnr,
)
from gspn_dit.autoencoder.vae import (
    NORMALISATION,
    NOT_HEEDED,
    adopt_normalisation,
    encode_moments,
    is_same_place,
    vae_record,
    vae_sha256,
)
from gspn_dit.conditioning import Conditioning
from gspn_dit.config import Config, TrainingConfig
from gspn_dit.data.source import LatentSource, Source, is_of_latents
from gspn_dit.diffusion import Batch, Objective, create_objective, create_scheduler
from gspn_dit.diffusion.sampling import check_guidance_of, check_steps
from gspn_dit.errors import InputError, not_none, renamed
from gspn_dit.inference.loading import load_class_names, load_transformer, pipeline_of
from gspn_dit.inference.pipeline import GSPNDiTPipeline, unguided
from gspn_dit.inference.run_description import RunDescription
from gspn_dit.launches import Work, work_of
from gspn_dit.models import create_model
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.models.registry import NoSuchOption, find_preset
from gspn_dit.storage.run_folder import Checkpoint, RunFolder
from gspn_dit.text_to_image_config import TextToImageConfig
from gspn_dit.training.compilation import rehearse_blocks
from gspn_dit.training.conditions import open_condition
from gspn_dit.training.ema import EMA
from gspn_dit.training.evaluator import Evaluator, draw_samples
from gspn_dit.training.latents import FromImages, FromMoments, LatentEncoder
from gspn_dit.training.record import Record, note
from gspn_dit.training.sharding import full_tensor
from gspn_dit.training.stop_request import StopRequest
from gspn_dit.training.stream import TrainingStream
from gspn_dit.training.task import Task, steps_after
from gspn_dit.training.trackers import note_scores, track_samples

logger = logging.getLogger(__name__)
OVERRIDES = "model.overrides."
STORED_LOOKED_AT, ENCODED_LOOKED_AT = 64, 4  # images, before training
LABELS = "y_embedder.embedding_table.weight"  # a row for each class and a last one for no class


@dataclass
class DiffusionTask(Task):
    """A latent diffusion transformer and its data.

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
        pipeline_parts: What its pipeline needs beside model and VAE, as of
            :class:`~gspn_dit.training.conditions.TrainingCondition`.
        condition_record: What a checkpoint notes of its kind of condition, as of that.
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
    pipeline_parts: dict[str, Any] = field(default_factory=dict)
    condition_record: dict[str, str] = field(default_factory=dict)

    same_at_resume = (
        "seed",
        "model.name",
        "model.overrides",
        "diffusion.objective",
        "data.image_size",
        "training.batch_size",
    )

    @classmethod
    def check(cls, config: Config) -> None:
        check_options(config)

    @classmethod
    def open(cls, config: Config, accelerator: Accelerator) -> tuple[DiffusionTask, LatentModel]:
        return open_task(config, accelerator)

    @property
    def name(self) -> str:
        return self.config.model.name

    @property
    def images(self) -> Source:
        return self.source

    @property
    def samples(self) -> TrainingStream:
        return self.stream

    @property
    def options(self) -> TrainingConfig:
        return self.config.training

    @property
    def num_workers(self) -> int:
        return self.config.data.num_workers

    def batch(self, samples: dict[str, Any], step: int) -> Batch:
        return make_batch(samples, self.encoder, self.conditioning)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.objective.loss(model, batch)

    def is_finite(self, batch: Batch) -> Tensor:
        return batch["latents"].isfinite().all()

    def blame_data(self) -> tuple[str, str]:
        return (
            f"latents of its batch from data.source={self.config.data.source!r}",
            "Check the data: for a store, `gspn-dit encode --verify STORE`",
        )

    def work(self, model: LatentModel, images: int) -> Work:
        return work_of(model, (images, *self.stream.latent_shape), training=True)

    def rehearse(self, model: LatentModel, images: int, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        rehearse_blocks(model, (images, *self.stream.latent_shape), autocast, self.options.compile_mode)

    def start(self, model: LatentModel) -> str | None:
        if self.config.model.init_from is None:
            return None
        return start_from(model, self.config.model.init_from, self.source.class_names)

    @property
    def data_record(self) -> dict[str, Any]:
        return {"vae": self.vae_record, **self.condition_record}

    def check_data(self, checkpoint: Checkpoint, saved: Config) -> None:
        of_before = {"name": saved.data.vae, "sha256": None, **NOT_HEEDED}
        check_same_vae(checkpoint.read_metadata().get("vae") or of_before, self.vae_record, self.config)
        for name, now in self.condition_record.items():
            if (before := checkpoint.read_metadata().get(name)) != now:
                raise InputError(
                    f"the run in {self.config.output_dir} reads captions by {before}, and this is {now}",
                    argument="text.tokenizer" if self.config.text.encoder is None else "text.encoder",
                    remedy="set it back",
                )

    @property
    def score_columns(self) -> Sequence[str] | None:
        return self.evaluator.columns if self.evaluator else None

    def look(self, ema: EMA, step: int, scores: Record | None, stop: StopRequest) -> None:
        """The grid of samples and the evaluation of a step, where they are due."""
        config, accelerator = self.config, self.accelerator
        drawn, scored = self.due(step, config.training.sample_every), self.due(step, config.evaluation.every)
        if not drawn and not scored:
            return
        pipeline = averaged_pipeline(self, ema)
        if drawn and accelerator.is_main_process:
            path = RunFolder(Path(config.output_dir)).samples(step)
            if draw_samples(pipeline, config, accelerator, path):
                note(f"the trackers have no samples of step {step}", track_samples, accelerator, path, step)
        accelerator.wait_for_everyone()
        if scored and (row := not_none(self.evaluator).score(pipeline, step, stop)):
            note_scores(not_none(scores), accelerator, row)  # of the main process, which alone has a row


def averaged_pipeline(task: DiffusionTask, ema: EMA) -> GSPNDiTPipeline:
    """The pipeline of the averaged weights, silent; it shares memory with them unless FSDP has split them.

    Every process calls this: what is split comes together on all of them.
    """
    with torch.device("meta"):
        model = task.build().eval()
    model.load_state_dict({name: full_tensor(tensor) for name, tensor in ema.tensors.items()}, assign=True)
    described = RunDescription.of(dataclasses.asdict(task.config))
    pipeline = pipeline_of(described, model, task.vae, **task.pipeline_parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_batch(samples: dict[str, Any], encoder: LatentEncoder, conditioning: Conditioning) -> Batch:
    """What the objective gets of samples of the stream: clean latents, and the condition, null where it is dropped."""
    return Batch(
        latents=encoder(samples),
        noise=samples["noise"],
        u=samples["u"],
        condition=conditioning.drop(samples["condition"], samples["drop"]),
        known=samples["condition"],
    )


def open_task(config: Config, accelerator: Accelerator) -> tuple[DiffusionTask, LatentModel]:
    """Open everything a configuration names, and make its network, freshly initialised, on the device.

    Raises :class:`InputError` for what cannot be.
    """
    with renamed(time_sampling="diffusion.time_sampling"):
        objective = create_objective(config.diffusion.objective, time_sampling=config.diffusion.time_sampling)
    with renamed(name="model.name"):
        kind = find_preset(config.model.name).family.conditioned_on
    with renamed(source="data.source", image_size="data.image_size", vae="data.vae"):
        condition = open_condition(kind, config, accelerator.device)
    source = condition.source
    if taken := sorted(condition.model_options.keys() & config.model.overrides.keys()):
        raise InputError("the data sets it", argument=OVERRIDES + taken[0], remedy="leave it out")
    steps_after(0, config.training, accelerator)  # refuses a batch that does not split evenly
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
        **condition.model_options,
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
    stream = TrainingStream(
        source,
        latent_shape=latent_shape,
        condition_names=condition.conditioning.names,
        dropout=config.diffusion.class_dropout,
        horizontal_flip=config.data.horizontal_flip,
        seed=config.seed,
    )
    evaluator = None
    if config.evaluation.every:
        evaluator = Evaluator(config, accelerator, condition.asked, condition.parts.get("class_names", ()))
    parts = (source, stream, encoder, condition.conditioning, objective, build, vae, record, evaluator)
    return DiffusionTask(config, accelerator, *parts, condition.parts, condition.record), model


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


def start_from(model: LatentModel, path: str, class_names: list[str]) -> str | None:
    """Give a new model the weights of what :func:`load_transformer` takes, of whatever image size.

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
    told, telling = (each.config.get("time_embedding") for each in (source, model))
    if told is not None and telling is not None and told != telling:
        raise InputError(
            f"its weights are for the time_embedding {told}, and this model has {telling}",
            argument="model.init_from",
            value=path,
            remedy=f"give --model.overrides '{{time_embedding: {told}}}'",
        )
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
    their_table, our_table = theirs.pop(LABELS, None), ours.pop(LABELS, None)
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
        if their_table is None or our_table is None:  # a model of text
            return None
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
    with renamed("sampling."):
        sampling = config.sampling
        scheduler = create_scheduler(config.diffusion.objective, sampling.sampler, sampling.scheduler_options)
        check_steps(scheduler, sampling.num_inference_steps)
        if config.diffusion.class_dropout not in (0, 1):  # which are sampled without guidance
            check_guidance_of(scheduler, sampling.guidance)
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


def check_same_vae(before: dict[str, Any], now: dict[str, Any], config: Config | TextToImageConfig) -> None:
    """Raise :class:`InputError` unless latents of a run's data are those of the VAE that it began with.

    Args:
        before: The record of a checkpoint; of one from before there were any, the name, None for the hashes, and None
            for the numbers of each channel, which were not heeded then.
        now: That of the data.
        config: The run's.
    """
    if before["sha256"] and now["sha256"]:
        same = before["sha256"]["encoder"] == now["sha256"]["encoder"]
    else:
        same = is_same_place(before["name"], now["name"])
    if not same:
        raise InputError(
            f"the run in {config.output_dir} has {before['name']!r}, and this is not the same",
            argument="data.vae",
            value=config.data.vae,
            remedy="name that VAE, wherever it lies",
        )
    for key in NORMALISATION:
        if before.get(key, now[key]) != now[key]:
            raise InputError(
                f"the latents' {key} is {now[key]}, and the run in {config.output_dir} began with {before[key]}",
                argument="data.source",
                value=config.data.source,
                remedy="set it back",
            )


Opened = tuple[AutoencoderKL | None, LatentEncoder, tuple[int, int, int], dict[str, Any]]


def open_latents(config: Config | TextToImageConfig, source: Source, device: torch.device) -> Opened:
    """The VAE, what makes latents of the source's samples, their shape (C, h, w), and the record of their VAE.

    The VAE is None where there is nothing to encode or to draw. A few latents are looked at, and warned of.

    Raises :class:`InputError` for a VAE that did not make the source's latents, or does not take the image size.
    """
    if is_of_latents(source):
        return open_stored_latents(config, source, device)
    return open_encoded_images(config, source, device)


def open_stored_latents(config: Config | TextToImageConfig, source: LatentSource, device: torch.device) -> Opened:
    """As :func:`open_latents`, where latents are stored."""
    drawn = config.draws
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


def open_encoded_images(config: Config | TextToImageConfig, source: Source, device: torch.device) -> Opened:
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


def open_vae_of(store: LatentSource, config: Config | TextToImageConfig, drawn: bool) -> AutoencoderKL | None:
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
