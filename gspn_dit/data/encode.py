"""Encode a dataset into a latent store: `gspn-dit encode --data … --vae … --image-size … --out …`.

Under `accelerate launch -m gspn_dit encode …` the processes share the shards. Nothing but the shards that are
still missing matters to a run, so one that was killed goes on with any number of processes.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("encode", prog="python -m gspn_dit.data.encode")
    raise SystemExit

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from gspn_dit.autoencoder.quality import (
    latent_statistics,
    psnr,
    reconstruction_error,
    some_images,
    warn_of_latents,
    warn_of_psnr,
)
from gspn_dit.autoencoder.vae import NORMALISATION, downsampling, encode_moments, load_vae, vae_sha256
from gspn_dit.data import open_images
from gspn_dit.data.caption_tokens import CaptionStates, caption_extras
from gspn_dit.data.captions import check_mirrored, open_captioned, some_captions
from gspn_dit.data.extras import Extra, Extras, bytes_per_image, check_extras, no_extras, to_json
from gspn_dit.data.images import ImageDataset, UnreadableImage
from gspn_dit.data.latent_store import begun_with, some_moments, verify, write_manifest, write_shard
from gspn_dit.data.sources import SOURCES
from gspn_dit.data.workers import load
from gspn_dit.errors import InputError, not_none, renamed
from gspn_dit.layers.norm import without_autocast
from gspn_dit.precision import autocast
from gspn_dit.processes import agreed_precision, join_processes
from gspn_dit.progress import Bar, Lines, progress
from gspn_dit.storage.files import begin_or_continue, check_place, write_json
from gspn_dit.storage.packaged import PACKAGED_TOKENIZERS, PACKAGED_VAES, absolute
from gspn_dit.text.parts import load_text_parts

if TYPE_CHECKING:
    from gspn_dit.commands import EncodeOptions, EncodeTextToImageOptions

logger = logging.getLogger(__name__)
MEASURED_LATENTS, MEASURED_IMAGES = 4096, 8  # for the manifest

# Images (n, 3, H, W), their labels and indices, files without one, and how many of them an EXIF tag would turn.
Batch = tuple[Tensor, list[int], list[int], list[UnreadableImage], int]


def main(options: EncodeOptions) -> None:
    """Encode a dataset into a store of latents for training, or verify one with --verify FOLDER."""
    if options.verify is None:
        encode(options)
        return
    with renamed(source="verify"):
        count = verify(options.verify)
    print(f"{options.verify}: all {count} images are as they were written")


class NoExtras:
    """Latents and labels alone."""

    declared: Mapping[str, Extra] = MappingProxyType({})

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {}


def encode(
    options: EncodeOptions | EncodeTextToImageOptions,
    extras: Extras | None = None,
    images: ImageDataset | None = None,
    vae: AutoencoderKL | None = None,
) -> None:
    """Encode a dataset into a store, or go on with one that was begun.

    Args:
        options: The command's.
        extras: Makes further tensors to store beside the latents of each image; None for none, or for what the options
            ask to store of captions.
        images: The dataset that `options.data` names, where it is open already.
        vae: The VAE that `options.vae` names, where it is loaded already.

    Raises:
        InputError: If something named cannot be had, or the folder was begun with something else.
    """
    if options.data is None or options.vae is None or options.image_size is None or options.out is None:
        raise TypeError("these options verify a store, and encode none")
    if images is None:
        images, of_captions = open_encoded(options)
        extras = extras or of_captions
    extras = extras or NoExtras()
    described = to_json(extras.declared)
    processes, device = join_processes(options.device)
    if isinstance(extras, CaptionStates):
        extras.encoder.model.to(device)
    vae = (load_vae(options.vae) if vae is None else vae).to(device)
    if options.image_size % downsampling(vae):
        raise InputError(
            f"this VAE wants a multiple of {downsampling(vae)} pixels", argument="image_size", value=options.image_size
        )
    precision = agreed_precision(options.mixed_precision, device)
    settings = {
        "data": absolute(options.data, SOURCES),
        "split": options.split,
        "class_names": images.class_names,
        "source_images": len(images),
        "image_size": options.image_size,
        "flipped": options.horizontal_flip,
        "exif_orientation": options.exif_orientation or None,  # as in stores of before, which say nothing
        "vae": absolute(options.vae, PACKAGED_VAES),
        "vae_sha256": vae_sha256(vae),
        **{key: getattr(vae.config, key) for key in NORMALISATION},
        "shard_size": options.shard_size,
        "mixed_precision": precision.name,
        "tokenizer": options.tokenizer and absolute(options.tokenizer, PACKAGED_TOKENIZERS),
        "text_encoder": options.text_encoder and absolute(options.text_encoder),
        "extras": described,
    }
    out, side = Path(options.out), options.image_size // downsampling(vae)
    values = len(images) * 2 * vae.config.latent_channels * side**2 * (2 if options.horizontal_flip else 1)
    size = 2 * values + len(images) * bytes_per_image(extras.declared)

    def make(shards: dict[str, range]) -> None:
        if processes.is_main_process:
            precision.say()
        with autocast(device, precision.name):
            encode_shards(images, vae, extras, out, shards, options, processes.is_main_process)

    manifest = fill_store(out, settings, size, make)
    if processes.is_main_process:
        measured = measure(out, [shard["file"] for shard in manifest["shards"]], vae, images)
        write_json(out / "manifest.json", manifest | measured)
        report(out, manifest | measured, vae)
    processes.destroy_process_group()


def fill_store(
    out: Path, settings: dict[str, Any], size: int, make: Callable[[dict[str, range]], None]
) -> dict[str, Any]:
    """Begin a store, or go on with one: have the shards made that are missing. Every process calls this.

    Args:
        out: The store's folder.
        settings: What encode.json is to hold, `source_images` and `shard_size` among it.
        size: Bytes that all shards will take, at the least.
        make: Writes the shards of a process; it is given their names, and which images each is of.

    Returns:
        The manifest, which is written.

    Raises :class:`InputError` if the folder was begun with something else, or holds something else.
    """
    processes = PartialState()
    count, each = settings["source_images"], settings["shard_size"]
    shards = {
        f"shard-{number:05d}.safetensors": range(start, min(start + each, count))
        for number, start in enumerate(range(0, count, each))
    }
    missing: list[str] = []
    if processes.is_main_process:
        if not out.exists():  # else some of it may be there
            check_place(out, folder=True, size=size)
        settings |= begin(out, settings)
        missing = [name for name in shards if not (out / name).exists()]
    (missing,) = broadcast_object_list([missing])  # one view of the folder, or a shard might be nobody's
    mine = missing[processes.process_index :: processes.num_processes]
    make({name: shards[name] for name in mine})
    processes.wait_for_everyone()
    return write_manifest(out, settings, list(shards), rewritten=missing)


def open_encoded(options: EncodeOptions | EncodeTextToImageOptions) -> tuple[ImageDataset, Extras | None]:
    """The images to encode, and what makes tensors of their captions if the options ask to store some.

    Raises :class:`InputError` if something named cannot be had.
    """
    data, size = not_none(options.data), not_none(options.image_size)
    chosen: dict[str, Any] = {"split": options.split, "exif_orientation": options.exif_orientation}
    with renamed(source="data", max_length="tokens"):
        if options.tokenizer is None and options.text_encoder is None:
            return open_images(data, size, **chosen), None
        captioned = open_captioned(data, size, **chosen)
        parts = load_text_parts(options.tokenizer, options.text_encoder, options.tokens)
        if options.horizontal_flip:
            check_mirrored(data, some_captions(captioned.caption, len(captioned)))
        return captioned, caption_extras(captioned, parts)


def measure(out: Path, shards: list[str], vae: AutoencoderKL, images: ImageDataset) -> dict[str, Any]:
    """What the manifest says of the latents: their mean and spread, and how well a few give their images back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unreadable images, which the encoding has named
        error = reconstruction_error(vae, some_images(images, MEASURED_IMAGES))
    return {
        "latent_statistics": latent_statistics(vae.config, some_moments(out, shards, MEASURED_LATENTS)),
        "reconstruction_psnr": round(psnr(error), 2),
    }


def report(out: Path, manifest: dict[str, Any], vae: AutoencoderKL) -> None:
    """Say what a store holds, and what is odd about it."""
    skipped = f", {len(manifest['skipped'])} unreadable files left out" if manifest["skipped"] else ""
    logger.info(f"{out}: {manifest['num_images']} images in {len(manifest['shards'])} shards{skipped}")
    if tagged := manifest["exif_tagged"]:
        done = "turned" if manifest["exif_orientation"] else "left as they lie; --exif-orientation true turns them"
        logger.info(f"{tagged} images have an EXIF orientation: {done}")
    latents, decibels = manifest["latent_statistics"], manifest["reconstruction_psnr"]
    logger.info(
        f"latents of {latents['images']} images: mean {latents['mean']:g}, standard deviation {latents['std']:g}; "
        f"a few images come back at {decibels:.1f} dB (PSNR)"
    )
    warn_of_latents(latents, vae.config)
    warn_of_psnr(decibels)


def begin(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the settings into a new folder, or check that the folder to continue in was begun with the same.

    The same VAE may lie elsewhere by now; where the folder does not say which it was, it must have the same name.

    Returns:
        What the manifest has to say of the VAE, as when the folder was begun.

    Raises:
        InputError: If it was begun with others, or holds something else.
    """
    check_place(out, folder=True)
    path = out / "encode.json"
    if not path.exists():
        if out.exists() and any(entry.suffix != ".tmp" for entry in out.iterdir()):
            raise InputError(
                "holds something that is no latent store", argument="out", value=out, remedy="choose another folder"
            )
        out.mkdir(parents=True, exist_ok=True)
    of_vae = {key: settings[key] for key in ("vae", "vae_sha256")}
    if path.exists():
        begun = begun_with(out)
        of_vae = {"vae": begun.get("vae"), "vae_sha256": begun.get("vae_sha256")}
        if of_vae["vae_sha256"] is None:
            of_vae["vae"] = settings["vae"]
        elif of_vae["vae_sha256"]["encoder"] != settings["vae_sha256"]["encoder"]:
            raise InputError(
                f"its weights are not those that {out} was begun with, of {of_vae['vae']!r}",
                argument="vae",
                value=settings["vae"],
                remedy="bring those back, or choose another --out",
            )
    begin_or_continue(path, settings | of_vae, "out", ("tokenizer", "text_encoder"), absent={"mixed_precision": "no"})
    return of_vae


def encode_shards(
    images: ImageDataset,
    vae: AutoencoderKL,
    extras: Extras,
    out: Path,
    shards: dict[str, range],
    options: EncodeOptions | EncodeTextToImageOptions,
    show: bool,
) -> None:
    """Encode each shard's range of images and write it; unreadable files are printed and left out.

    Batches begin with a shard, so that an image's are the same whichever process encodes it. `show` the progress.
    """
    step = options.batch_size
    batches = [indices[start : start + step] for indices in shards.values() for start in range(0, len(indices), step)]
    loader = load(_Loadable(images), batches, options.num_workers, collate_fn=_together)
    with progress(total=sum(map(len, shards.values())), desc="encode", unit="image", disable=not show) as bar:
        for name, indices in shards.items():
            of_shard = islice(loader, len(range(0, len(indices), step)))
            write_shard(out / name, *encode_shard(of_shard, vae, extras, options, bar))


def encode_shard(
    batches: Iterable[Batch],
    vae: AutoencoderKL,
    extras: Extras,
    options: EncodeOptions | EncodeTextToImageOptions,
    bar: Bar | Lines,
) -> tuple[Tensor, Tensor | None, Tensor, list[str], int, dict[str, Tensor]]:
    """What :func:`write_shard` writes of a shard's batches, in its order.

    Raises :class:`InputError` if a moment is not finite in float16, or an extra is not as declared.
    """
    side = not_none(options.image_size) // downsampling(vae)
    empty = torch.empty(0, 2 * vae.config.latent_channels, side, side)
    moments, flipped, labels, skipped, tagged = [empty], [empty], [], [], 0
    made = [no_extras(extras.declared)]
    for pixels, batch_labels, indices, faults, batch_tagged in batches:
        for unreadable in faults:
            bar.write(f"unreadable image, left out: {unreadable}")
            skipped.append(unreadable.path)
        if batch_labels:
            pixels = pixels.to(vae.device)
            moments.append(encode_moments(vae, pixels).cpu())
            if options.horizontal_flip:
                flipped.append(encode_moments(vae, pixels.flip(-1)).cpu())
            labels += batch_labels
            tagged += batch_tagged
            with torch.no_grad():
                made.append({name: tensor.cpu() for name, tensor in extras(indices).items()})
            check_extras(extras.declared, made[-1], len(indices))
        bar.update(len(batch_labels) + len(faults))
    mirrored = half(flipped) if options.horizontal_flip else None
    with without_autocast(vae.device):  # the CPU's joins no float16
        joined = {name: torch.cat([each[name] for each in made]) for name in extras.declared}
    return half(moments), mirrored, torch.tensor(labels, dtype=torch.int64), skipped, tagged, joined


def _together(samples: list[tuple[Tensor, int, bool, int] | UnreadableImage]) -> Batch:
    """The images (n, 3, H, W) of those that could be read, their labels and indices, the others, and how many have a
    tag.

    In one tensor, for each that a worker sends holds a file descriptor.
    """
    readable = [sample for sample in samples if not isinstance(sample, UnreadableImage)]
    images = torch.stack([image for image, *_ in readable]) if readable else torch.empty(0)
    faults = [sample for sample in samples if isinstance(sample, UnreadableImage)]
    labels, indices = [label for _, label, _, _ in readable], [index for *_, index in readable]
    return images, labels, indices, faults, sum(tagged for _, _, tagged, _ in readable)


def half(moments: list[Tensor]) -> Tensor:
    """One float16 tensor of batches of moments. Raises :class:`InputError` if a value is not finite in float16."""
    stored = torch.cat(moments).half()
    if not stored.isfinite().all():
        raise InputError("it gives latents that are not finite in float16", argument="vae", remedy="check its weights")
    return stored


class _Loadable(Dataset):
    """The images, with unreadable ones as their exception: a worker's exception would end the loading."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool, int] | UnreadableImage:
        try:
            return *self.images.load_tagged(index), index
        except UnreadableImage as error:
            return error
