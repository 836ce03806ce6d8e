"""A teacher's latents and text embeddings in a latent store: `gspn-dit encode-t2i --base … --data … --out …`.

Pictures with captions are encoded by the pipeline's VAE and its text encoders. Prompts alone will do too: the pipeline
draws a picture for each, and its latents are kept, so that a replacement learns from what its teacher makes.

A store holds, beside the latents, what the pipeline's UNet is told of each picture: `encoder_hidden_states` (L, D)
float16 and, with SD-XL, `text_embeds` (P,) float16 and `time_ids` (6,) float32.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("encode-t2i", prog="python -m gspn_dit.data.encode_t2i")
    raise SystemExit

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from gspn_dit.autoencoder.quality import latent_statistics, warn_of_latents
from gspn_dit.autoencoder.vae import NORMALISATION, downsampling, unscale, vae_sha256, weights_sha256
from gspn_dit.data.captioned_source import size_condition, size_of_whole, warn_of_cut_captions
from gspn_dit.data.captions import open_captioned
from gspn_dit.data.encode import MEASURED_LATENTS, encode, fill_store, half
from gspn_dit.data.extras import Extra, bytes_per_image, check_extras, to_json
from gspn_dit.data.latent_store import some_moments, write_shard
from gspn_dit.data.sources import SOURCES
from gspn_dit.diffusion.sampling import image_generator
from gspn_dit.errors import InputError, renamed
from gspn_dit.layers.norm import without_autocast
from gspn_dit.precision import autocast
from gspn_dit.processes import agreed_precision, join_processes
from gspn_dit.progress import Bar, Lines, progress
from gspn_dit.storage.files import write_json
from gspn_dit.storage.packaged import PACKAGED_TEXT_TO_IMAGE, absolute
from gspn_dit.text.prompts import prompt_lines
from gspn_dit.text.teacher import (
    STORED,
    embed,
    is_xl,
    load_teacher,
    text_encoders,
    text_sha256,
    trained_size,
)

if TYPE_CHECKING:
    from gspn_dit.commands import EncodeTextToImageOptions as Options

logger = logging.getLogger(__name__)
NO_VARIANCE = -30.0  # a log-variance, the least that diffusers heeds: drawn latents are what they are


def main(options: Options) -> None:
    """Encode captioned pictures into a latent store, or have the pipeline draw latents of prompts for one."""
    pipe = load_teacher(options.base)
    size = options.image_size or trained_size(pipe)
    if size % downsampling(pipe.vae):
        raise InputError(
            f"this pipeline wants a multiple of {downsampling(pipe.vae)} pixels", argument="image_size", value=size
        )
    options = dataclasses.replace(options, image_size=size)
    if options.data is not None:
        encode_pictures(pipe, options, options.data, size)
    else:
        draw_latents(pipe, options, read_prompts(str(options.prompts), options.split, size), size)


class TextOfPictures:
    """What a pipeline's UNet is told of pictures, for a store.

    Args:
        pipe: The pipeline; its text encoders are moved to the device.
        captions: What each picture shows, by its index.
        sizes: What SD-XL is told of each picture's size (6,), by its index.
        device: Of the text encoders.

    Attributes:
        declared: What the tensors are like, by name.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        captions: Callable[[int], str],
        sizes: Callable[[int], Tensor],
        device: torch.device,
    ) -> None:
        self.pipe, self.captions, self.sizes = pipe, captions, sizes
        for part in text_encoders(pipe):
            part.to(device)
        made_by = text_sha256(pipe)
        like = embed(pipe, [""])
        self.declared: Mapping[str, Extra] = {
            name: Extra(STORED, tuple(tensor.shape[1:]), made_by) for name, tensor in like.items()
        } | ({"time_ids": Extra(torch.float32, (6,))} if is_xl(pipe) else {})

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        told = {name: tensor.to(STORED) for name, tensor in embed(self.pipe, list(map(self.captions, indices))).items()}
        return told | ({"time_ids": torch.stack(list(map(self.sizes, indices)))} if is_xl(self.pipe) else {})


def encode_pictures(pipe: DiffusionPipeline, options: Options, source: str, image_size: int) -> None:
    """Encode captioned pictures into a store, or go on with one that was begun. Raises as :func:`encode` does."""
    with renamed(source="data"):
        images = open_captioned(source, image_size, split=options.split)
    warn_of_cut_captions(pipe, images.caption, len(images))
    _, device = join_processes(options.device)
    extras = TextOfPictures(pipe, images.caption, partial(size_condition, images), device)
    encode(options, extras, images, pipe.vae)


def read_prompts(source: str, split: str, image_size: int) -> list[str]:
    """The prompts of a text file, or the captions of captioned pictures.

    Raises :class:`InputError` if there are none.
    """
    if source in SOURCES or Path(source).is_dir() or source.endswith(".jsonl"):
        with renamed(source="prompts"):
            images = open_captioned(source, image_size, split=split)
        return [images.caption(index) for index in range(len(images))]
    return prompt_lines(source)


def draw_latents(pipe: DiffusionPipeline, options: Options, prompts: list[str], image_size: int) -> None:
    """Have a pipeline draw a picture for each prompt, into a store, or go on with one that was begun.

    Raises :class:`InputError` if the folder was begun with something else, or latents are not finite.
    """
    warn_of_cut_captions(pipe, prompts.__getitem__, len(prompts))
    processes, device = join_processes(options.device)
    pipe.to(device)
    whole = size_of_whole(image_size)  # as the pipeline is told when it is asked for no other
    extras = TextOfPictures(pipe, prompts.__getitem__, lambda _: whole, device)
    precision = agreed_precision(options.mixed_precision, device)
    side, channels = image_size // downsampling(pipe.vae), pipe.vae.config.latent_channels
    settings = {
        "data": absolute(str(options.prompts), SOURCES),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "split": options.split,
        "class_names": ["image"],
        "source_images": len(prompts),
        "image_size": image_size,
        "flipped": False,
        "vae": absolute(options.base, PACKAGED_TEXT_TO_IMAGE),
        "vae_sha256": vae_sha256(pipe.vae),
        **{key: getattr(pipe.vae.config, key) for key in NORMALISATION},
        "shard_size": options.shard_size,
        "mixed_precision": precision.name,
        "extras": to_json(extras.declared),
        "drawn_by": weights_sha256(pipe.unet),
        "scheduler": type(pipe.scheduler).__name__,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
    }
    out, size = Path(options.out), len(prompts) * (2 * 2 * channels * side**2 + bytes_per_image(extras.declared))

    def make(shards: dict[str, range]) -> None:
        if processes.is_main_process:
            precision.say()
        number, alone = sum(map(len, shards.values())), not processes.is_main_process
        with (
            autocast(device, precision.name),
            progress(total=number, desc="draw", unit="image", disable=alone) as bar,
        ):
            for name, indices in shards.items():
                moments, told = draw_shard(pipe, prompts, indices, extras, options, image_size, bar)
                labels = torch.zeros(len(indices), dtype=torch.int64)
                write_shard(out / name, moments, None, labels, [], extras=told)

    manifest = fill_store(out, settings, size, make)
    if processes.is_main_process:
        files = [shard["file"] for shard in manifest["shards"]]
        statistics = latent_statistics(pipe.vae.config, some_moments(out, files, MEASURED_LATENTS))
        write_json(out / "manifest.json", manifest | {"latent_statistics": statistics})
        logger.info(f"{out}: latents of {len(prompts)} prompts in {len(files)} shards")
        warn_of_latents(statistics, pipe.vae.config)
    processes.destroy_process_group()


def draw_shard(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    indices: range,
    extras: TextOfPictures,
    options: Options,
    image_size: int,
    bar: Bar | Lines,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Moments (n, 2C, h, w) float16 of the pictures of some prompts, and what the UNet is told of them (n, …)."""
    moments: list[Tensor] = []
    told: list[dict[str, Tensor]] = []
    for start in range(0, len(indices), options.batch_size):
        some = indices[start : start + options.batch_size]
        drawn = pipe(
            [prompts[index] for index in some],
            height=image_size,
            width=image_size,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=[image_generator(options.seed, index) for index in some],
            output_type="latent",
        ).images
        mean = unscale(pipe.vae.config, drawn.float()).cpu()
        moments.append(torch.cat([mean, torch.full_like(mean, NO_VARIANCE)], dim=1))
        told.append({name: tensor.cpu() for name, tensor in extras(some).items()})
        check_extras(extras.declared, told[-1], len(some))
        bar.update(len(some))
    with without_autocast(pipe.vae.device):  # the CPU's joins no float16
        return half(moments), {name: torch.cat([each[name] for each in told]) for name in extras.declared}
