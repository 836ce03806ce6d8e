"""The training of a text-to-image model of Stable Diffusion's architecture: opened and checked before any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from gspn_dit.config import TrainingConfig
from gspn_dit.data.caption_tokens import INPUT_IDS, captions_of, made_by
from gspn_dit.data.captions import (
    TokenizedCaptions,
    check_mirrored,
    open_captioned,
    some_captions,
    warn_of_long_captions,
)
from gspn_dit.data.latent_store import LatentStore, is_latent_store, origin_of
from gspn_dit.data.source import Source, is_of_latents
from gspn_dit.diffusion import Batch
from gspn_dit.diffusion.sampling import check_steps
from gspn_dit.diffusion.stable_diffusion import CHAIN, StableDiffusion, stable_diffusion_scheduler
from gspn_dit.errors import InputError, machine_fault, not_none, renamed
from gspn_dit.inference.stable_diffusion import (
    check_scaling,
    draw_prompt_grid,
    stable_diffusion_pipeline,
    tokenizer_of,
)
from gspn_dit.launches import Work
from gspn_dit.models.compiled_blocks import compile_blocks
from gspn_dit.models.macs import count_macs
from gspn_dit.models.text_to_image import TEXT_ENCODER, TextToImageModel, filled_text_encoder, filled_unet
from gspn_dit.storage.packaged import PACKAGED_TEXT_ENCODERS
from gspn_dit.storage.run_folder import Checkpoint, RunFolder
from gspn_dit.text.tokens import load_tokenizer, tokenize
from gspn_dit.text_to_image_config import TextToImageConfig, TextToImageModelConfig
from gspn_dit.training.diffusion import check_same_vae, open_latents
from gspn_dit.training.ema import EMA
from gspn_dit.training.latents import LatentEncoder
from gspn_dit.training.record import Record, note
from gspn_dit.training.sharding import full_tensor
from gspn_dit.training.stop_request import StopRequest
from gspn_dit.training.stream import TrainingStream, open_source
from gspn_dit.training.task import Task, steps_after
from gspn_dit.training.trackers import track_samples

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

HOW = "encode anew with --tokenizer"
SET_BY_DATA = ("sample_size", "in_channels", "out_channels")
OTHER_CHAINS = ("trained_betas", "rescale_betas_zero_snr")  # of diffusers' schedulers; training knows neither
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")  # of diffusers' UNet
OF_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class TextToImageTask(Task):
    """A text-to-image model and its captioned data.

    Args:
        config: Its options.
        accelerator: What its processes share.
        source: The training data.
        stream: Its samples, in order.
        encoder: Makes clean latents of them.
        objective: What is learned.
        scheduler: Draws samples of the same chain.
        build: Makes another network of the same kind, on the default device.
        tokenizer: Makes tokens of captions.
        vae: The autoencoder, or None where there is nothing to encode or to draw.
        vae_record: What VAE the latents are of, for the checkpoints.
    """

    config: TextToImageConfig
    accelerator: Accelerator
    source: Source
    stream: TrainingStream
    encoder: LatentEncoder
    objective: StableDiffusion
    scheduler: SchedulerMixin
    build: Callable[[], TextToImageModel]
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL | None
    vae_record: dict[str, Any]

    same_at_resume = (
        "seed",
        "model.unet",
        "model.text_encoder",
        "model.text_encoder_from",
        "model.train_text_encoder",
        "model.base",
        "diffusion.prediction_type",
        "data.image_size",
        "data.sample_posterior",
        "training.batch_size",
    )

    def __post_init__(self) -> None:
        self.no_words = tokenize(self.tokenizer, [""]).to(self.accelerator.device)
        self._averaged: TextToImageModel | None = None

    @classmethod
    def check(cls, config: TextToImageConfig) -> None:
        if taken := [name for name in SET_BY_DATA if name in config.model.unet]:
            raise InputError("the data set it", argument=f"model.unet.{taken[0]}", remedy="leave it out")
        if config.model.base is not None and (Path(config.model.base) / "text_encoder_2").is_dir():
            raise InputError(
                "it has two text encoders, as SD-XL",
                argument="model.base",
                value=config.model.base,
                wanted="a saved StableDiffusionPipeline, of Stable Diffusion 1 or 2",
            )
        with renamed("sampling."):
            check_steps(stable_diffusion_scheduler(config.sampling.sampler), config.sampling.num_inference_steps)

    @classmethod
    def open(cls, config: TextToImageConfig, accelerator: Accelerator) -> tuple[TextToImageTask, TextToImageModel]:
        text = text_options_of(config)
        with renamed("model."):
            tokenizer = load_tokenizer(tokenizer_of(vars(config.model)), text["max_position_embeddings"])
        text = {**of_tokenizer(tokenizer), **text}
        if text["vocab_size"] < len(tokenizer):
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens",
                argument="model.text_encoder.vocab_size",
                value=text["vocab_size"],
                wanted="as many at least",
            )
        with renamed(source="data.source", image_size="data.image_size", vae="data.vae"):
            source = open_with_tokens(config, tokenizer)
        if config.data.horizontal_flip:
            looked_at = some_captions(captions_of(source, tokenizer), len(source))
            with renamed("data."):
                check_mirrored(origin_of(source, config.data.source), looked_at)
        steps_after(0, config.training, accelerator)  # refuses a batch that does not split evenly
        if is_of_latents(source):
            check_scaling(source, config.data.source)
        with renamed(vae="data.vae"):
            vae, encoder, latent_shape, record = open_latents(config, source, accelerator.device)
        if vae is not None:
            check_scaling(vae.config, config.data.vae)
        scheduler = scheduler_of(config)
        objective = StableDiffusion.of(scheduler, config.diffusion.min_snr_gamma)
        unet = unet_options_of(config, latent_shape, text["hidden_size"])
        set_seed(config.seed)
        build = partial(TextToImageModel, unet, text, config.model.train_text_encoder)
        with renamed(unet_options="model.unet", text_encoder_options="model.text_encoder"):
            model = build().to(accelerator.device)
        stream = TrainingStream(
            source,
            latent_shape=latent_shape,
            condition_names=(INPUT_IDS,),
            dropout=config.diffusion.caption_dropout,
            horizontal_flip=config.data.horizontal_flip,
            seed=config.seed,
        )
        parts = (source, stream, encoder, objective, scheduler, build, tokenizer, vae, record)
        return cls(config, accelerator, *parts), model

    @property
    def name(self) -> str:
        return self.config.model.base or "UNet2DConditionModel with CLIPTextModel"

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

    def batch(self, samples: Any, step: int) -> Batch:
        """Clean latents, and the tokens of their captions, those of the empty one where they are dropped."""
        if not self.config.data.sample_posterior:
            samples = {**samples, "posterior_noise": torch.zeros_like(samples["posterior_noise"])}
        ids = torch.where(samples["drop"][:, None], self.no_words, samples["condition"][INPUT_IDS])
        return Batch(latents=self.encoder(samples), noise=samples["noise"], u=samples["u"], condition={INPUT_IDS: ids})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.objective.loss(model, batch)

    def is_finite(self, batch: Batch) -> Tensor:
        return batch["latents"].isfinite().all()

    def blame_data(self) -> tuple[str, str]:
        return (
            f"latents of its batch from data.source={self.config.data.source!r}",
            "Check the data: for a store, `gspn-dit encode --verify STORE`",
        )

    def work(self, model: TextToImageModel, images: int) -> Work:
        with torch.device("meta"):
            macs = count_macs(self.build(), self.stream.latent_shape[1:])
        blocks = sum(type(module).__name__ in BLOCKS for module in model.modules())
        return Work(blocks, macs, images, training=True)

    def rehearse(
        self, model: TextToImageModel, images: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> None:
        """With one layer for each level."""
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            shallow = {
                "unet_options": {**model.config.unet_options, "layers_per_block": 1},
                "text_encoder_options": {**model.config.text_encoder_options, "num_hidden_layers": 1},
            }
            small = TextToImageModel.from_config({**model.config, **shallow}).to(device).train()
            compile_blocks(small, self.options.compile_mode)
            example = small.example_inputs(self.stream.latent_shape[1:])
            with autocast():
                predicted = small(**{name: tensor.repeat_interleave(images, 0) for name, tensor in example.items()})
            predicted.float().sum().backward()

    def start(self, model: TextToImageModel) -> str | None:
        """The weights of `model.base` and of `model.text_encoder_from`."""
        named = self.config.model
        if named.base is not None:
            load_part(model.unet, UNet2DConditionModel, Path(named.base) / "unet", "model.base")
        if (saved := saved_text_encoder(named)) is not None:
            from transformers import CLIPTextModel

            load_part(not_none(model.text_encoder), CLIPTextModel, *saved)
        return None

    def parameter_groups(self, model: TextToImageModel) -> list[dict[str, Any]]:
        """Weight decay is of matrices and convolutions: not of vectors, nor of tables of embeddings."""
        tables = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in model.parameters():
            if parameter.requires_grad:
                groups[parameter.ndim > 1 and id(parameter) not in tables].append(parameter)
        decay = self.options.weight_decay
        return [{"params": groups[True], "weight_decay": decay}, {"params": groups[False], "weight_decay": 0.0}]

    @property
    def data_record(self) -> dict[str, Any]:
        chain = {key: self.scheduler.config[key] for key in CHAIN}
        return {"vae": self.vae_record, "tokens": made_by(self.tokenizer), "chain": chain}

    def check_data(self, checkpoint: Checkpoint, saved: TextToImageConfig) -> None:
        before, now = checkpoint.read_metadata(), self.data_record
        check_same_vae(before["vae"], now["vae"], self.config)
        for key, argument in (("tokens", "model.tokenizer"), ("chain", "model.base")):
            if before[key] != now[key]:
                raise InputError(
                    f"the run in {self.config.output_dir} began with {before[key]}, this is {now[key]}",
                    argument=argument,
                    value=getattr(self.config.model, argument.partition(".")[2]),
                    remedy="set it back",
                )

    @property
    def score_columns(self) -> Sequence[str] | None:
        return None

    def look(self, ema: EMA, step: int, scores: Record | None, stop: StopRequest) -> None:
        """The grid of samples of a step, where it is due."""
        if not self.due(step, self.config.training.sample_every):
            return
        pipe, accelerator = self.averaged_pipeline(ema), self.accelerator
        if accelerator.is_main_process:
            path = RunFolder(Path(self.config.output_dir)).samples(step)
            if note(f"no {path}", self.draw, pipe, path):
                note(f"the trackers have no samples of step {step}", track_samples, accelerator, path, step)
        accelerator.wait_for_everyone()

    def draw(self, pipe: StableDiffusionPipeline, path: Path) -> None:
        """The run's prompts, or the captions of the first images, with the same noise each time."""
        options = self.config.sampling
        with self.accelerator.autocast():
            draw_prompt_grid(
                pipe,
                options.prompts or self.first_captions(options.num_images),
                path,
                seed=self.config.seed,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
            )

    def first_captions(self, count: int) -> list[str]:
        """The captions of the first images of the data, as their tokens have them."""
        ids = [self.source.sample(i, names=(INPUT_IDS,))[INPUT_IDS] for i in range(min(count, len(self.source)))]
        return [self.tokenizer.decode(each, skip_special_tokens=True) for each in ids]

    def averaged_pipeline(self, ema: EMA) -> StableDiffusionPipeline:
        """The pipeline of the averaged weights, in evaluation mode; every process calls this."""
        if self._averaged is None:
            device = self.accelerator.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
                self._averaged = self.build().eval().requires_grad_(False)
        parameters = dict(self._averaged.named_parameters())
        for name, tensor in ema.tensors.items():
            parameters[name].copy_(full_tensor(tensor))
        return stable_diffusion_pipeline(self._averaged, not_none(self.vae), self.tokenizer, self.scheduler)


def open_with_tokens(config: TextToImageConfig, tokenizer: CLIPTokenizer) -> Source:
    """The source of the data: its tokens are made of captions as images come, and there in a store, which is checked.

    Raises :class:`InputError` if there are no captions, or a store has tokens of another tokenizer or length.
    """
    data = config.data
    if not is_latent_store(data.source):
        images = open_captioned(data.source, data.image_size, seed=config.seed, exif_orientation=data.exif_orientation)
        named = config.model
        fixed = named.base is not None or named.text_encoder_from is not None
        more = "" if fixed else ", or give more model.text_encoder.max_position_embeddings"
        warn_of_long_captions(some_captions(images.caption, len(images)), tokenizer, f"shorten them{more}")
        return TokenizedCaptions(images, tokenizer)
    store = not_none(open_source(data, config.seed))
    stored = store.extras.get(INPUT_IDS) if isinstance(store, LatentStore) else None
    if stored is None:
        raise InputError("it holds no tokens of captions", argument="source", value=data.source, remedy=HOW)
    if stored.shape != (tokenizer.model_max_length,):
        raise InputError(
            f"its captions have {stored.shape[0]} tokens, and the text encoder takes {tokenizer.model_max_length}",
            argument="source",
            value=data.source,
            remedy=f"{HOW}, and --tokens {tokenizer.model_max_length}",
        )
    if stored.made_by != made_by(tokenizer):
        raise InputError(
            "its captions' tokens are of another tokenizer",
            argument="source",
            value=data.source,
            remedy="name that with --model.tokenizer",
        )
    return store


def saved_text_encoder(named: TextToImageModelConfig) -> tuple[Path, str] | None:
    """The folder of the saved text encoder to begin with, and the option that names it; None if there is none."""
    if (name := named.text_encoder_from) is not None:
        return PACKAGED_TEXT_ENCODERS.get(name, Path(name)), "model.text_encoder_from"
    return None if named.base is None else (Path(named.base) / "text_encoder", "model.base")


def text_options_of(config: TextToImageConfig) -> dict[str, Any]:
    """Options of the text encoder: those of a saved one if one is named. Raises :class:`InputError`."""
    named = config.model
    if (found := saved_text_encoder(named)) is None:
        given = filled_text_encoder(named.text_encoder)
        return {key: value for key, value in given.items() if key in named.text_encoder or key not in OF_TOKENIZER}
    from transformers import CLIPTextConfig

    folder, argument = found
    with reading(folder, argument):
        saved = CLIPTextConfig.from_pretrained(folder, local_files_only=True).to_diff_dict()
        known = CLIPTextConfig().to_dict()
    left_out = ("architectures", "dtype", "model_type", "torch_dtype", "transformers_version")
    saved = {key: value for key, value in saved.items() if key in known and key not in left_out}
    defaults = CLIPTextConfig()
    # what a saved one leaves out is transformers' default, which for some of these is not Stable Diffusion's
    always = {key: getattr(defaults, key) for key in TEXT_ENCODER if key == "vocab_size" or key not in OF_TOKENIZER}
    return {**always, **saved}


def of_tokenizer(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """Options of a text encoder that follow from its tokenizer."""
    ids = {key: getattr(tokenizer, key) for key in OF_TOKENIZER if key != "vocab_size"}
    return {"vocab_size": len(tokenizer), **ids}


def unet_options_of(config: TextToImageConfig, latent_shape: tuple[int, int, int], width: int) -> dict[str, Any]:
    """Options of the UNet for latents (C, h, w) and hidden states of text of that width.

    Raises :class:`InputError` if the UNet of `model.base` takes other latents.
    """
    channels, side = latent_shape[:2]
    if config.model.base is None:
        options = {"cross_attention_dim": width, **filled_unet(config.model.unet)}
    else:
        with reading(Path(config.model.base) / "unet", "model.base"):
            saved = UNet2DConditionModel.load_config(Path(config.model.base) / "unet", local_files_only=True)
        options = {key: value for key, value in saved.items() if not key.startswith("_")}
        if options.get("in_channels", 4) != channels or options.get("out_channels", 4) != channels:
            raise InputError(
                f"its latents have {channels} channels, and the UNet of {config.model.base} takes "
                f"{options.get('in_channels', 4)}",
                argument="data.vae",
                value=config.data.vae,
            )
    return {**options, "sample_size": side, "in_channels": channels, "out_channels": channels}


def scheduler_of(config: TextToImageConfig) -> SchedulerMixin:
    """What draws the run's samples: its chain is that of `model.base`, or Stable Diffusion's.

    Raises :class:`InputError` if it cannot be had.
    """
    chain: Mapping[str, Any] = {}
    if config.model.base is not None:
        folder = Path(config.model.base) / "scheduler"
        with reading(folder, "model.base"):
            saved = DDIMScheduler.load_config(folder, local_files_only=True)
        for key in OTHER_CHAINS:
            if saved.get(key):
                raise InputError(
                    f"its scheduler has {key}={saved[key]!r}, which is another chain than its betas' ends say",
                    argument="model.base",
                    value=config.model.base,
                    remedy="name a model without",
                )
        chain = {key: saved[key] for key in CHAIN if key in saved}
    if config.diffusion.prediction_type is not None:
        chain = {**chain, "prediction_type": config.diffusion.prediction_type}
    with renamed("diffusion."):
        return stable_diffusion_scheduler(config.sampling.sampler, **chain)


def load_part(part: nn.Module, kind: Any, folder: Path, argument: str) -> None:
    """Give a part of the model the weights of a folder. Raises :class:`InputError` if they are another network's."""
    with reading(folder, argument):
        theirs = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        part.load_state_dict(theirs.state_dict())


@contextmanager
def reading(folder: Path, argument: str) -> Iterator[None]:
    """In the block, files of a folder that cannot be read are an InputError of the option that names them."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if machine_fault(error) is not None:
            raise
        raise InputError(
            f"what is in {folder} cannot be read ({' '.join(str(error).split())[:300]})",
            argument=argument,
            wanted="a folder that `save_pretrained` wrote",
        ) from error
