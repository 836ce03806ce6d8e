"""The typed configuration of a training run: what every kind of training has, and what a diffusion model's has."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import yaml

from gspn_dit.arguments import (
    CompileMode,
    MixedPrecision,
    Switch,
    check_guidance,
    check_num_inference_steps,
    default_workers,
)
from gspn_dit.data.sources import SOURCES, split_name
from gspn_dit.errors import renamed
from gspn_dit.evaluation.classifiers import check_features
from gspn_dit.guidance import Guidance, GuidanceSchedule
from gspn_dit.options import parse, require
from gspn_dit.storage.files import replacing
from gspn_dit.storage.packaged import PACKAGED_MODELS, PACKAGED_TOKENIZERS, PACKAGED_VAES, absolute


@dataclass
class ModelConfig:
    """Model: its name, sizes and first weights.

    Args:
        name: `<family>-<size>-<patch>`; `gspn-dit models` lists them.
        overrides: Constructor arguments to change, for example `{chunk: 4, global_layers: 2}`.
        init_from: A run, a checkpoint, an exported folder, a packaged model or published weights of DiT or SiT that a
            new run begins with, averaged ones where there are; if not given, weights are random.
    """

    name: str = "gspn-dit-xl-2"
    overrides: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None

    def __post_init__(self) -> None:
        if self.init_from is not None:
            self.init_from = absolute(self.init_from, PACKAGED_MODELS)


@dataclass
class DataConfig:
    """Data: images or latents, and the VAE of the latents.

    Args:
        source: A named source (`digits`, `photos`), a folder of `class/*.jpg`, or a store made by `gspn-dit encode`;
            for a model of text, a captioned one.
        vae: A packaged VAE (`digits`, `photos`), or a hub name or a local folder of a diffusers AutoencoderKL.
        image_size: Side of the square images in pixels.
        horizontal_flip: Mirror half of the images, at random.
        exif_orientation: Turn a folder's images as their EXIF orientation says; ADM, and so every published figure,
            does not. A store keeps what it was encoded with.
        num_workers: Processes that read data, per training process; 0 reads in the training process itself. If not
            given, one for each core, up to 4.
    """

    source: str = "data/imagenet-256-latents"
    vae: str = "stabilityai/sd-vae-ft-ema"
    image_size: int = 256
    horizontal_flip: bool = True
    exif_orientation: bool = False
    num_workers: int = field(default_factory=default_workers)

    def __post_init__(self) -> None:
        require(self.image_size >= 1, "data.image_size", self.image_size, "a positive number of pixels")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")
        self.source, self.vae = absolute(self.source, SOURCES), absolute(self.vae, PACKAGED_VAES)


@dataclass
class TextConfig:
    """Text: how a model of the family `gspn-t2i` reads captions; other models have none.

    Args:
        tokenizer: A packaged tokenizer (`scenes`: CLIP's vocabulary), or a folder of one of transformers; if not given,
            the encoder's own, or `scenes`.
        encoder: A folder of a frozen text encoder of transformers (CLIPTextModel, T5EncoderModel and others); if not
            given, the model has a small one of its own, which trains with it.
        max_tokens: Tokens of a caption, its start and end among them; captions of more are cut.
    """

    tokenizer: str | None = None
    encoder: str | None = None
    max_tokens: int = 77

    def __post_init__(self) -> None:
        require(self.max_tokens >= 3, "text.max_tokens", self.max_tokens, "3 or more: a start, a word and an end")
        if self.tokenizer is not None:
            self.tokenizer = absolute(self.tokenizer, PACKAGED_TOKENIZERS)
        if self.encoder is not None:
            self.encoder = absolute(self.encoder)


@dataclass
class DiffusionConfig:
    """Objective: what the model learns to predict, at which times, with or without labels.

    Args:
        objective: `ddpm` (noise and variance, as DiT) or `flow` (velocity, as SiT).
        time_sampling: For `flow`: `uniform` or `logit-normal` times.
        class_dropout: Share of labels replaced by the null class, or of captions by the empty one, for classifier-free
            guidance.
    """

    objective: Literal["ddpm", "flow"] = "ddpm"
    time_sampling: Literal["uniform", "logit-normal"] = "uniform"
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.class_dropout <= 1, "diffusion.class_dropout", self.class_dropout, "a share from 0 to 1")


@dataclass
class LoopConfig:
    """Steps, optimiser, averages, and what is written when, of every training.

    Args:
        max_steps: Optimiser steps in total.
        batch_size: Images per step over all processes and accumulation steps (the global batch).
        gradient_accumulation_steps: Backward passes per step.
        learning_rate: Peak learning rate of AdamW.
        adam_beta1: AdamW's first beta.
        adam_beta2: AdamW's second beta.
        weight_decay: AdamW's decoupled weight decay.
        lr_schedule: After warm-up: `constant`, or `cosine` down to min_learning_rate at the last step.
        warmup_steps: Steps over which the learning rate rises linearly from warmup_learning_rate.
        warmup_learning_rate: Where the warm-up begins.
        min_learning_rate: Where the cosine ends.
        max_grad_norm: Clip the gradient's global norm to this; 0 for no clipping.
        ema_decay: Decay of the exponential moving average (EMA) of the weights, which a trained model is.
        posthoc_ema_every: Steps between snapshots of the power-function averages, from which
            `gspn-dit posthoc-ema` makes an average of any width; 0 for none.
        posthoc_ema_sigma_rels: Relative widths of those averages.
        mixed_precision: `auto` is bf16 where the device has instructions for it and float32 elsewhere; `no` is
            float32; or `bf16`, or `fp16`.
        gradient_checkpointing: Recompute blocks in the backward pass to save memory.
        compile: Run the model's blocks through torch.compile; `auto` does so on CUDA in runs that are long enough to
            pay for it.
        compile_mode: How they are compiled: `default`, or `max-autotune`, which times every product with what follows
            it in several ways on the device at hand; it takes much longer to compile, and has not run on a GPU yet.
        cuda_graph: Replay a step's forward and backward pass as a CUDA graph; `auto` does so where a small model waits
            for its launches. Off by default: it has not run on a GPU yet.
        log_every: Steps between lines in metrics.csv and the trackers.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many of the newest checkpoints are kept.
        trackers: accelerate trackers, for example `[tensorboard]`.
    """

    max_steps: int = 400_000
    batch_size: int = 256
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    warmup_learning_rate: float = 0.0
    min_learning_rate: float = 0.0
    max_grad_norm: float = 0.0
    ema_decay: float = 0.9999
    posthoc_ema_every: int = 0
    posthoc_ema_sigma_rels: list[float] = field(default_factory=lambda: [0.05, 0.10])
    mixed_precision: MixedPrecision = "auto"
    gradient_checkpointing: bool = False
    compile: Switch = "auto"
    compile_mode: CompileMode = "default"
    cuda_graph: Switch = False
    log_every: int = 100
    checkpoint_every: int = 10_000
    keep_checkpoints: int = 3
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        for key in ("batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, key) >= 1, f"training.{key}", getattr(self, key), "1 or more")
        for key in ("warmup_steps", "posthoc_ema_every", "max_grad_norm", "weight_decay"):
            require(getattr(self, key) >= 0, f"training.{key}", getattr(self, key), "0 or more")
        require(self.learning_rate > 0, "training.learning_rate", self.learning_rate, "a positive number")
        for key in ("warmup_learning_rate", "min_learning_rate"):
            within = 0 <= getattr(self, key) <= self.learning_rate
            require(within, f"training.{key}", getattr(self, key), f"0 to the learning rate, {self.learning_rate:g}")
        for key in ("ema_decay", "adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, key) < 1, f"training.{key}", getattr(self, key), "a number in [0, 1)")
        given = self.posthoc_ema_sigma_rels
        distinct = bool(given) and len(set(given)) == len(given) and all(0 < sigma <= 0.28 for sigma in given)
        require(distinct, "training.posthoc_ema_sigma_rels", given, "different numbers above 0, at most 0.28")

    @property
    def sigma_rels(self) -> list[float]:
        """Relative widths of the power-function averages to keep: none if there are to be no snapshots."""
        return self.posthoc_ema_sigma_rels if self.posthoc_ema_every else []


@dataclass
class TrainingConfig(LoopConfig):
    """Training: steps, optimiser, averages, and what is written when.

    Args:
        sample_every: Steps between sample grids; 0 for none.
    """

    sample_every: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_steps >= 1, "training.max_steps", self.max_steps, "1 or more")
        require(self.sample_every >= 0, "training.sample_every", self.sample_every, "0 or more")


@dataclass
class SamplingConfig:
    """Sampling: how a run's sample grids are drawn, and the defaults of `sample` for that run.

    Args:
        sampler: For `ddpm`: `ddpm`, `ddim`, `dpm++`, `edm`; for `flow`: `euler`, `heun`, `sde`, `dopri5`, `edm`; or a
            scheduler of diffusers by its class; if not given, the first of these.
        scheduler_options: What of the sampler is other than by default, for example `{use_karras_sigmas: true}`.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        guidance_interval: Range of noise levels at which guidance acts, from 0 (clean) to 1 (pure noise).
        guidance_schedule: How the guidance scale depends on the noise level.
        guidance_power: Exponent of `power-cosine`.
        guidance_rescale: By how much a guided prediction is scaled to the standard deviation of the model's own; 0
            leaves it.
        apg_eta: Of adaptive projected guidance, the share left of the parallel part of an update; 1 is all.
        apg_norm_threshold: Its greatest norm of an update; 0 for none.
        apg_momentum: Its weight of the updates before, between -1 and 1; 0 for none.
        num_images: Images in the training grid.
        prompts: Of a model of text: what grids show, in turn; if none are given, the first captions of the data.
    """

    sampler: str | None = None
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_schedule: GuidanceSchedule = "constant"
    guidance_power: float = 4.0
    guidance_rescale: float = 0.0
    apg_eta: float = 1.0
    apg_norm_threshold: float = 0.0
    apg_momentum: float = 0.0
    num_images: int = 16
    prompts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_num_inference_steps(self.num_inference_steps, "sampling.")
        with renamed("sampling."):
            _ = self.guidance  # which refuses what cannot be
        require(self.num_images >= 1, "sampling.num_images", self.num_images, "1 or more")

    @property
    def guidance(self) -> Guidance:
        """How it is guided. Raises :class:`InputError` for what cannot be."""
        return Guidance(**{each.name: getattr(self, each.name) for each in dataclasses.fields(Guidance)})


@dataclass
class EvaluationConfig:
    """Evaluation: a quick score of the averaged weights every so many steps, in evaluation.csv and the trackers.

    It costs num_samples · sampling.num_inference_steps forward passes, shared by the processes. Use it to compare steps
    and runs of this configuration; scores for a paper come from `gspn-dit evaluate`, on 50,000 images.

    Args:
        every: Steps between evaluations; 0 for none.
        num_samples: Images that are drawn, of the classes in turn.
        reference: What they are compared with: an npz of mu and sigma (`gspn-dit reference` makes one, of any
            features); or a folder, an npz of images or a named source, which are read at a run's first evaluation.
        features: `inception`, or the name of a classifier: `digits`, `photos`.
        weights: Weights file of the features; if not given, the packaged one, or torch-fidelity's download.
        guidance_scale: Classifier-free guidance; 1 is none.
        batch_size: Images per forward pass in each process.
    """

    every: int = 0
    num_samples: int = 2000
    reference: str | None = None
    features: str = "inception"
    weights: str | None = None
    guidance_scale: float = 1.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        require(self.every >= 0, "evaluation.every", self.every, "0 or more")
        require(self.num_samples >= 2, "evaluation.num_samples", self.num_samples, "2 or more")
        check_guidance(self.guidance_scale, (0, 1), "evaluation.")
        require(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "1 or more")
        given = self.reference is not None or not self.every
        require(given, "evaluation.reference", self.reference, "images or statistics to compare with")
        check_features("evaluation.features", self.features)
        if self.reference is not None and split_name(self.reference) is None:
            self.reference = absolute(self.reference)
        if self.weights is not None:
            self.weights = absolute(self.weights)


@dataclass
class RunConfig:
    """Where any training's run is, and its seed; a kind of training has more.

    Args:
        output_dir: The run's folder.
        resume: `auto` continues the run in output_dir from its newest checkpoint (or starts it); `no` starts it.
        seed: Seed of the weights, the data order and every random draw.
    """

    output_dir: str = "runs/default"
    resume: Literal["auto", "no"] = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.output_dir != "", "output_dir", "", "a folder for the run")
        require(0 <= self.seed < 2**31, "seed", self.seed, "a whole number from 0 to 2147483647")

    def save(self, path: str | os.PathLike) -> None:
        """Write it as YAML, atomically."""
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False))

    @classmethod
    def load(cls, path: str | os.PathLike, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, with `--key value` strings over it. Raises :class:`InputError`."""
        return parse(cls, ["--config", str(path), *overrides], exit_on_error=False)


@dataclass
class Config(RunConfig):
    """Run: everything that `train` needs, written beside its checkpoints as config.yaml.

    Args:
        model: Name, sizes and first weights of the network.
        data: Images or latents, and their VAE.
        text: How captions are read.
        diffusion: The objective.
        training: Steps, optimiser, averages, and what is written when.
        sampling: How sample grids are drawn.
        evaluation: The quick score.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def draws(self) -> bool:
        """Whether images are drawn on the way, to be looked at or scored."""
        return bool(self.training.sample_every or self.evaluation.every)


def _plain(value: Any) -> Any:
    """Tuples as lists, so that safe YAML can hold them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
