"""Distillation: layers in the place of a Stable Diffusion UNet's self-attention learn what that gives.

Teacher and student are one UNet: for the teacher's turn the replaced layers stand in it again. Nothing but the layers
in their place is trained, averaged and saved. The loss of the second stage is that of LinFusion (arXiv 2409.02097).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from gspn_dit.autoencoder.vae import downsampling, vae_sha256, weights_sha256
from gspn_dit.data import LatentStore, how_to_encode, is_latent_store
from gspn_dit.data.captioned_source import CaptionedSource, warn_of_cut_captions
from gspn_dit.data.captions import open_captioned
from gspn_dit.data.latent_store import is_unfinished_store
from gspn_dit.data.source import LatentSource, is_of_latents
from gspn_dit.data.sources import SOURCES
from gspn_dit.diffusion.stable_diffusion import StableDiffusion
from gspn_dit.distillation_config import DistillationConfig, DistillationTrainingConfig
from gspn_dit.errors import InputError, not_none, renamed
from gspn_dit.inference.replacements import load_replacement
from gspn_dit.launches import Work
from gspn_dit.models.attention_replacement import AttentionReplacement, replace_self_attention
from gspn_dit.precision import DTYPES
from gspn_dit.storage.run_folder import Checkpoint
from gspn_dit.text.teacher import (
    STORED,
    embed,
    embed_nothing,
    is_xl,
    load_teacher,
    text_encoders,
    text_sha256,
)
from gspn_dit.training.ema import EMA
from gspn_dit.training.latents import FromImages, FromMoments, LatentEncoder
from gspn_dit.training.layer_outputs import LayerOutputs, feature_errors, mean_of, relative_errors
from gspn_dit.training.record import Record
from gspn_dit.training.stop_request import StopRequest
from gspn_dit.training.stream import TrainingStream
from gspn_dit.training.task import Task, steps_after
from gspn_dit.training.trackers import note_scores

PARTS = ("noise", "teacher", "features")  # of the loss of the second stage


@dataclass
class Teacher:
    """What of a pipeline a distillation goes on with.

    Args:
        unet: Its UNet, frozen.
        objective: What the UNet has learned to predict.
        nothing: What it is told where there is no caption, without an axis of the batch; float32, as the captions are,
            and like them rounded to float16 where these are a store's.
        readers: The pipeline, if captions and pictures are to be encoded as they come; None if they have been.
        record: What tells it from other teachers: SHA-256 of its UNet, its VAE's encoder and its text encoders.
    """

    unet: UNet2DConditionModel
    objective: StableDiffusion
    nothing: dict[str, Tensor]
    readers: DiffusionPipeline | None
    record: dict[str, str]


@dataclass
class DistillationTask(Task):
    """Layers in the place of self-attention, their teacher, and its data.

    Args:
        config: Its options.
        accelerator: What its processes share.
        teacher: Whose layers are replaced.
        replacement: What is trained, mounted.
        outputs: What layers put out.
        source: The training data.
        stream: Its samples, in order.
        encoder: Makes clean latents of them.
    """

    config: DistillationConfig
    accelerator: Accelerator
    teacher: Teacher
    replacement: AttentionReplacement
    outputs: LayerOutputs
    source: LatentSource | CaptionedSource
    stream: TrainingStream
    encoder: LatentEncoder
    _parts: list[dict[str, Tensor]] = field(default_factory=list)

    same_at_resume = (
        "seed",
        "replacement.mixer",
        "replacement.layers",
        "replacement.keep_attention",
        "replacement.chunk",
        "replacement.windows",
        "replacement.global_layers",
        "distillation.stage",
        "data.image_size",
        "training.batch_size",
    )

    @classmethod
    def check(cls, config: DistillationConfig) -> None:
        """The configuration has looked at all that can be told without the teacher."""

    @classmethod
    def open(
        cls, config: DistillationConfig, accelerator: Accelerator
    ) -> tuple[DistillationTask, AttentionReplacement]:
        steps_after(0, config.training, accelerator)  # refuses a batch that does not split evenly
        check_not_sharded(accelerator)
        pipe = load_teacher(config.base)
        source, encoder, latent_shape = open_data(config, pipe, accelerator.device)
        teacher = teacher_of(pipe, is_of_latents(source), accelerator.device)
        set_seed(config.seed)
        with renamed("replacement.", model="base"):
            replacement = replaced_layers(config, teacher.unet)
        outputs = mount_beside(replacement, teacher.unet, config, accelerator)
        names = [*teacher.nothing] if is_of_latents(source) else ["caption"]
        stream = TrainingStream(
            source,
            latent_shape=latent_shape,
            condition_names=(*names, "time_ids") if is_xl(pipe) else tuple(names),
            dropout=config.distillation.caption_dropout,
            horizontal_flip=False,  # a mirrored picture is not what its caption says
            seed=config.seed,
        )
        return cls(config, accelerator, teacher, replacement, outputs, source, stream, encoder), replacement

    @property
    def name(self) -> str:
        layers = len(self.replacement.layer_names)
        return f"{self.config.replacement.mixer} in the place of {layers} self-attention layers of {self.config.base}"

    @property
    def images(self) -> LatentSource | CaptionedSource:
        return self.source

    @property
    def samples(self) -> TrainingStream:
        return self.stream

    @property
    def options(self) -> DistillationTrainingConfig:
        return self.config.training

    @property
    def num_workers(self) -> int:
        return self.config.data.num_workers

    @property
    def layerwise(self) -> bool:
        """Whether this is the first stage."""
        return self.config.distillation.stage == "layerwise"

    def batch(self, samples: dict[str, Any], step: int) -> dict[str, Any]:
        told, readers = dict(samples["condition"]), self.teacher.readers
        if readers is not None:
            told |= embed(readers, told.pop("caption"))
        drop = samples["drop"]
        for name, null in self.teacher.nothing.items():
            dropped = drop.view(-1, *[1] * null.ndim)
            told[name] = torch.where(dropped, null, told[name].float())
        return {"latents": self.encoder(samples), "noise": samples["noise"], "u": samples["u"], "condition": told}

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The loss (B,) float32 of the run's stage; its parts are noted down."""
        objective = self.teacher.objective
        clean, noise, times = batch["latents"].float(), batch["noise"].float(), objective.times(batch["u"])
        inputs = unet_inputs(objective.noisy(clean, times, noise), times, batch["condition"])
        if self.layerwise:
            with self.outputs.listening():
                model(**inputs)
            errors = relative_errors(*self.outputs.take())
            self._parts.append({name: error.detach().mean() for name, error in errors.items()})
            return mean_of(errors)
        options = self.config.distillation
        with self.outputs.listening():
            with torch.no_grad(), self.replacement.unmounted():
                taught = self.teacher.unet(**inputs)[0].float()
            predicted = model(**inputs)[0].float()
        errors_of = {
            "noise": mean_square(predicted - objective.target(clean, times, noise)),
            "teacher": mean_square(predicted - taught),
            "features": mean_of(feature_errors(*self.outputs.take())),
        }
        self._parts.append({name: error.detach().mean() for name, error in errors_of.items()})
        weights = (options.noise_weight, options.teacher_weight, options.feature_weight)
        return sum_of(weights, [errors_of[name] for name in PARTS])

    def is_finite(self, batch: dict[str, Any]) -> Tensor:
        return torch.stack([each.isfinite().all() for each in (batch["latents"], *batch["condition"].values())]).all()

    def blame_data(self) -> tuple[str, str]:
        return (
            f"latents or embeddings of its batch from data.source={self.config.data.source!r}",
            "Check the data: for a store, `gspn-dit encode --verify STORE`",
        )

    def work(self, model: AttentionReplacement, images: int) -> Work:
        _, height, width = self.stream.latent_shape
        weights = sum(p.numel() for p in self.teacher.unet.parameters())
        return Work(len(model.layer_names), weights, images * height * width, training=True)

    def rehearse(self, model: AttentionReplacement, images: int, autocast: AbstractContextManager[object]) -> None:
        """Nothing is compiled: the configuration refuses it."""

    def recompute(self, model: AttentionReplacement) -> None:
        """As every task, but for the first stage: there nothing but the layers themselves has gradients."""
        if not self.layerwise:
            self.teacher.unet.enable_gradient_checkpointing()

    def start(self, model: AttentionReplacement) -> str | None:
        if self.config.replacement.init_from is None:
            return None
        return start_from(model, self.config.replacement.init_from)

    @property
    def data_record(self) -> dict[str, Any]:
        return {"teacher": self.teacher.record}

    def check_data(self, checkpoint: Checkpoint, saved: DistillationConfig) -> None:
        before = checkpoint.read_metadata()["teacher"]
        for part, sha256 in self.teacher.record.items():
            if before[part] != sha256:
                raise InputError(
                    f"its {part} is not that of {saved.base!r}, which the run in {self.config.output_dir} began with",
                    argument="base",
                    value=self.config.base,
                    remedy="name that pipeline, wherever it lies",
                )

    @property
    def score_columns(self) -> Sequence[str]:
        """Of the loss's parts, or of each layer's relative error."""
        return ("step", *(self.replacement.layer_names if self.layerwise else PARTS))

    def look(self, ema: EMA, step: int, scores: Record | None, stop: StopRequest) -> None:
        """Note the parts of a step's loss, where a line of metrics.csv is due; every process calls this."""
        parts, self._parts = self._parts, []
        if not self.due(step, self.options.log_every):
            return
        mine = torch.stack([torch.stack(list(each.values())) for each in parts]).mean(0)
        row = dict(zip(parts[0], self.accelerator.reduce(mine, "mean").tolist(), strict=True))
        if self.accelerator.is_main_process:
            note_scores(not_none(scores), self.accelerator, {"step": step} | row)


def unet_inputs(noisy: Tensor, times: Tensor, condition: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a UNet is called with, to give a tuple: noisy latents (B, C, h, w), timesteps (B,), and what it is told."""
    sizes = {name: condition[name] for name in ("text_embeds", "time_ids") if name in condition}
    return {
        "sample": noisy,
        "timestep": times,
        "encoder_hidden_states": condition["encoder_hidden_states"],
        "added_cond_kwargs": sizes or None,
        "return_dict": False,
    }


def mean_square(difference: Tensor) -> Tensor:
    """Mean square (B,) of differences (B, C, h, w)."""
    return difference.square().flatten(1).mean(1)


def sum_of(weights: Sequence[float], errors: Sequence[Tensor]) -> Tensor:
    """The weighted sum of errors (B,); one of weight 0 is left out, and its gradient with it."""
    return torch.stack([weight * error for weight, error in zip(weights, errors, strict=True) if weight]).sum(0)


def teacher_of(pipe: DiffusionPipeline, encoded: bool, device: torch.device) -> Teacher:
    """What of a pipeline a distillation goes on with, on the device.

    Args:
        pipe: The pipeline, on the CPU.
        encoded: Whether the data hold latents and embeddings, so that the VAE and the text encoders may go.
        device: Where what stays is moved to.
    """
    record = {
        "UNet": weights_sha256(pipe.unet),
        "VAE": vae_sha256(pipe.vae)["encoder"],
        "text encoder": text_sha256(pipe),
    }
    with renamed(prediction_type="base", scheduler="base"):
        objective = StableDiffusion.of(pipe.scheduler)
    nothing = {name: tensor.to(device) for name, tensor in embed_nothing(pipe).items()}
    if encoded:  # rounded as the captions of a store are
        nothing = {name: tensor.to(STORED).float() for name, tensor in nothing.items()}
    if not encoded:
        for part in text_encoders(pipe):
            part.to(device)
    return Teacher(pipe.unet.to(device), objective, nothing, None if encoded else pipe, record)


def replaced_layers(config: DistillationConfig, unet: UNet2DConditionModel) -> AttentionReplacement:
    """New layers for a UNet, of its attention's weights. Raises :class:`InputError` for options that it cannot have."""
    options = config.replacement
    return replace_self_attention(
        unet,
        mixer=options.mixer,
        layers=options.layers,
        keep_attention=options.keep_attention,
        chunk=options.chunk,
        windows=options.windows,
        global_layers=options.global_layers,
        base_model=Path(config.base).name if Path(config.base).exists() else config.base,
    )


def mount_beside(
    replacement: AttentionReplacement, unet: UNet2DConditionModel, config: DistillationConfig, accelerator: Accelerator
) -> LayerOutputs:
    """Mount new layers on their UNet, with both listened to; its weights take the run's precision, for they stay."""
    names, layerwise = replacement.layer_names, config.distillation.stage == "layerwise"
    if accelerator.mixed_precision in DTYPES:
        unet.to(DTYPES[accelerator.mixed_precision])
    teachers = {name: unet.get_submodule(name) for name in names}
    replacement.mount(unet, dtype=torch.float32)
    return LayerOutputs(teachers, {name: replacement.layer(name) for name in names}, alone=layerwise)


def check_not_sharded(accelerator: Accelerator) -> None:
    """Raise :class:`InputError` under FSDP: it gathers weights at a model's own call, and the UNet calls the layers."""
    if accelerator.distributed_type is DistributedType.FSDP:
        raise InputError(
            argument="distributed_type",
            value="FSDP",
            wanted="several processes as they are, for the new layers are small",
            remedy="launch with --multi_gpu",
        )


def open_data(
    config: DistillationConfig, pipe: DiffusionPipeline, device: torch.device
) -> tuple[LatentSource | CaptionedSource, LatentEncoder, tuple[int, int, int]]:
    """The training data, what makes latents of their samples, and the shape (C, h, w) of these.

    Raises :class:`InputError` if there are none, or a store is not of this teacher or of another image size.
    """
    data = config.data
    with renamed("data."):
        if is_latent_store(data.source):
            store = LatentStore(data.source)
            check_store(store, data.image_size, pipe, config.base)
            return store, FromMoments(store), store.latent_shape
        if is_unfinished_store(data.source):
            raise InputError(
                "holds an unfinished latent store",
                argument="source",
                value=data.source,
                remedy=how_to_encode(data.source),
            )
        if data.source not in SOURCES and not Path(data.source).exists():
            raise InputError(
                "no such folder",
                argument="source",
                value=data.source,
                remedy=(
                    "give a named source, a folder of pictures with captions, or a store; to make one: "
                    f"`gspn-dit encode-t2i --base {config.base} --data … --out {data.source}`"
                ),
            )
        images = open_captioned(data.source, data.image_size, seed=config.seed)
    warn_of_cut_captions(pipe, images.caption, len(images))
    side, rest = divmod(data.image_size, downsampling(pipe.vae))
    if rest:
        raise InputError(
            f"this VAE wants a multiple of {downsampling(pipe.vae)}", argument="data.image_size", value=data.image_size
        )
    return CaptionedSource(images), FromImages(pipe.vae.to(device)), (pipe.vae.config.latent_channels, side, side)


def check_store(store: LatentStore, image_size: int, pipe: DiffusionPipeline, base: str) -> None:
    """Raise :class:`InputError` for a store that a teacher did not make, or of another image size."""
    if store.image_size != image_size:
        raise InputError(f"it holds {store.image_size}-pixel pictures", argument="image_size", value=image_size)
    wanted = ["encoder_hidden_states", *(["text_embeds", "time_ids"] if is_xl(pipe) else [])]
    remedy = f"make it with `gspn-dit encode-t2i --base {base}`"
    if missing := [name for name in wanted if name not in store.extras]:
        raise InputError(
            f"it holds no {missing[0]}, which {base} is told", argument="source", value=str(store.folder), remedy=remedy
        )
    of_vae = None if store.vae_sha256 is None else store.vae_sha256["encoder"]
    of_text = store.extras["encoder_hidden_states"].made_by
    for what, found, its in (
        ("VAE", of_vae, vae_sha256(pipe.vae)["encoder"]),
        ("text encoder", of_text, text_sha256(pipe)),
    ):
        if found != its:
            raise InputError(
                f"it was made by another {what} than that of {base}",
                argument="source",
                value=str(store.folder),
                remedy=remedy,
            )


def start_from(model: AttentionReplacement, path: str) -> str:
    """Give new layers the weights of a run (its averages), a checkpoint or a saved replacement; says of which.

    Raises :class:`InputError` if there are none, or they are other layers.
    """
    with renamed(model="replacement.init_from"):
        source = load_replacement(path)
    theirs, ours = dict(source.named_parameters()), dict(model.named_parameters())
    for name in theirs | ours:
        found, wanted = (tuple(of[name].shape) if name in of else "not there" for of in (theirs, ours))
        if found != wanted:
            raise InputError(
                f"its {name} is {found}, this replacement's {wanted}",
                argument="replacement.init_from",
                value=path,
                wanted="one of the same base, mixer and layers",
            )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
    return f"layers begin with the weights of {path}"
