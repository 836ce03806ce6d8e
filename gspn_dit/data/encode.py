"""Encode a dataset into a latent store: `python -m gspn_dit.data.encode --data … --vae … --image-size … --out …`.

Under `accelerate launch -m gspn_dit.data.encode …` the processes share the shards. Nothing but the shards that are
still missing matters to a run, so one that was killed goes on with any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from gspn_dit.data import open_images
from gspn_dit.data.images import ImageDataset, UnreadableImage
from gspn_dit.data.latents import verify, write_manifest, write_shard
from gspn_dit.data.vae import downsampling, encode_moments, load_vae
from gspn_dit.data.workers import load
from gspn_dit.devices import join_processes
from gspn_dit.errors import InputError, renamed
from gspn_dit.files import begin_or_continue
from gspn_dit.options import command, require
from gspn_dit.progress import Bar, Lines, progress
from gspn_dit.weights import PACKAGED

Batch = tuple[Tensor, list[int], list[UnreadableImage]]  # images (n, 3, H, W), their labels, files without one


@dataclass
class Options:
    """What to encode, or what to verify.

    Args:
        data: `digits`, `photos`, or a folder of `class/*.jpg`.
        vae: `digits`, `photos`, a hub name or a local folder of a diffusers AutoencoderKL.
        image_size: Side of the square images in pixels.
        out: The store's folder; a run that was interrupted continues there.
        split: Of digits and photos; a folder is one split.
        horizontal_flip: Encode every image's mirror image too, for training with horizontal flips.
        batch_size: Images the VAE encodes at once.
        shard_size: Images a shard file.
        num_workers: Processes that read images; 0 reads in this one.
        device: `auto` takes the accelerator if there is one.
        verify: Instead of encoding, compare this finished store's shards with their checksums.
    """

    data: str | None = None
    vae: str | None = None
    image_size: int | None = None
    out: str | None = None
    split: Literal["train", "test"] = "train"
    horizontal_flip: bool = False
    batch_size: int = 32
    shard_size: int = 4096
    num_workers: int = 4
    device: str = "auto"
    verify: str | None = None

    def __post_init__(self) -> None:
        if self.verify is None:
            for key in ("data", "vae", "image_size", "out"):
                require(getattr(self, key) is not None, key, None, f"a value; encoding needs --{key.replace('_', '-')}")
        for key in ("batch_size", "shard_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")


def main(options: Options) -> None:
    """Encode a dataset into a store of latents for training, or verify one with --verify FOLDER."""
    if options.verify is not None:
        with renamed(source="verify"):
            count = verify(options.verify)
        print(f"{options.verify}: all {count} images are as they were written")
        return
    with renamed(source="data"):
        images = open_images(options.data, options.image_size, split=options.split)
    processes, device = join_processes(options.device)
    vae = load_vae(options.vae).to(device)
    if options.image_size % downsampling(vae):
        raise InputError(f"image_size={options.image_size}: this VAE wants a multiple of {downsampling(vae)} pixels")
    settings = {
        "data": stable_name(options.data),
        "split": options.split,
        "class_names": images.class_names,
        "source_images": len(images),
        "image_size": options.image_size,
        "flipped": options.horizontal_flip,
        "vae": stable_name(options.vae),
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor,
        "shard_size": options.shard_size,
    }
    out = Path(options.out)
    shards = {
        f"shard-{number:05d}.safetensors": range(start, min(start + options.shard_size, len(images)))
        for number, start in enumerate(range(0, len(images), options.shard_size))
    }
    missing: list[str] = []
    if processes.is_main_process:
        begin(out, settings)
        missing = [name for name in shards if not (out / name).exists()]
    (missing,) = broadcast_object_list([missing])  # one view of the folder, or a shard might be nobody's
    mine = missing[processes.process_index :: processes.num_processes]
    encode_shards(images, vae, out, {name: shards[name] for name in mine}, options, processes.is_main_process)
    processes.wait_for_everyone()
    manifest = write_manifest(out, settings, list(shards), rewritten=missing)
    if processes.is_main_process:
        skipped = f", {len(manifest['skipped'])} unreadable files left out" if manifest["skipped"] else ""
        print(f"{out}: {manifest['num_images']} images in {len(manifest['shards'])} shards{skipped}")
    processes.destroy_process_group()


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new folder, or check that the folder to continue in was begun with the same.

    Raises:
        InputError: If it was begun with others, or holds something else.
    """
    path = out / "encode.json"
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(entry.suffix != ".tmp" for entry in out.iterdir())):
            raise InputError(f"out={str(out)!r} holds something that is no latent store: choose another folder")
        out.mkdir(parents=True, exist_ok=True)
    begin_or_continue(path, settings, "out")


def encode_shards(
    images: ImageDataset, vae: AutoencoderKL, out: Path, shards: dict[str, range], options: Options, show: bool
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
            write_shard(out / name, *encode_shard(of_shard, vae, options, bar))


def encode_shard(
    batches: Iterable[Batch], vae: AutoencoderKL, options: Options, bar: Bar | Lines
) -> tuple[Tensor, Tensor | None, Tensor, list[str]]:
    """What :func:`write_shard` writes of a shard's batches: moments, those of the mirror images, labels, skipped files.

    Raises :class:`InputError` if a moment is not finite in float16.
    """
    side = options.image_size // downsampling(vae)
    empty = torch.empty(0, 2 * vae.config.latent_channels, side, side)
    moments, flipped, labels, skipped = [empty], [empty], [], []
    for pixels, batch_labels, faults in batches:
        for unreadable in faults:
            bar.write(f"unreadable image, left out: {unreadable}")
            skipped.append(unreadable.path)
        if batch_labels:
            pixels = pixels.to(vae.device)
            moments.append(encode_moments(vae, pixels).cpu())
            if options.horizontal_flip:
                flipped.append(encode_moments(vae, pixels.flip(-1)).cpu())
            labels += batch_labels
        bar.update(len(batch_labels) + len(faults))
    mirrored = half(flipped) if options.horizontal_flip else None
    return half(moments), mirrored, torch.tensor(labels, dtype=torch.int64), skipped


def _together(samples: list[tuple[Tensor, int] | UnreadableImage]) -> Batch:
    """The images (n, 3, H, W) of those that could be read, their labels, and the others.

    In one tensor, for each that a worker sends holds a file descriptor.
    """
    readable = [sample for sample in samples if not isinstance(sample, UnreadableImage)]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    faults = [sample for sample in samples if isinstance(sample, UnreadableImage)]
    return images, [label for _, label in readable], faults


def half(moments: list[Tensor]) -> Tensor:
    """One float16 tensor of batches of moments. Raises :class:`InputError` if a value is not finite in float16."""
    stored = torch.cat(moments).half()
    if not stored.isfinite().all():
        raise InputError("vae: it gives latents that are not finite in float16; check its weights")
    return stored


def stable_name(name: str) -> str:
    """A local folder by its absolute path, so that the store can be read from anywhere; any other name as it is."""
    return os.path.abspath(name) if name not in PACKAGED and os.path.isdir(name) else name


class _Loadable(Dataset):
    """The images, with unreadable ones as their exception: a worker's exception would end the loading."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UnreadableImage:
        try:
            return self.images.load(index)
        except UnreadableImage as error:
            return error


if __name__ == "__main__":
    command(main, Options, prog="python -m gspn_dit.data.encode")
