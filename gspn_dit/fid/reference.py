"""The command that makes a reference file in ADM's format, which the evaluation compares samples with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gspn_dit.data import (
    LatentStore,
    decode,
    downsampling,
    is_latent_store,
    load_vae,
    open_images,
    sample_posterior,
)
from gspn_dit.data.digits import IMAGE_SIZE as DIGITS_SIZE
from gspn_dit.data.latents import how_to_encode, is_unfinished_store
from gspn_dit.errors import InputError, renamed
from gspn_dit.fid.evaluate import check_images, statistics_of, warn_of_few
from gspn_dit.fid.extractors import FeatureName, create_extractor
from gspn_dit.fid.features import BATCH_SIZE, layer_widths
from gspn_dit.fid.images import NAMED, ImageSet, of_dataset, open_samples
from gspn_dit.fid.npz import Notes, write_reference
from gspn_dit.fid.processes import launched
from gspn_dit.files import check_place
from gspn_dit.options import require
from gspn_dit.progress import progress

ADM_IMAGES = 10_000
DECODED_TOGETHER = 8


@dataclass
class Options:
    """A reference file in ADM's format.

    Args:
        data: `digits`, `photos`, `digits:test`, `photos:test`, a folder of images, or a latent store.
        out: The npz file to write.
        image_size: Side in pixels that a folder of `class/*.jpg` is cropped to as ADM does; null takes a folder's
            images as they are.
        num_images: How many images go into the file, for precision and recall, drawn at random; null takes ADM's
            10000, or all if there are fewer. The statistics are of all images.
        seed: Of the draw.
        vae: What decodes a latent store; null takes the VAE that made it.
        features: `inception`, or `digits` or `photos` for the packaged classifier of those.
        weights: Weights file of the features; null takes the packaged ones, or torch-fidelity's download.
        device: `auto` takes the accelerator if there is one, and each process of `accelerate launch` its own.
    """

    data: str
    out: str
    image_size: int | None = None
    num_images: int | None = None
    seed: int = 0
    vae: str | None = None
    features: FeatureName = "inception"
    weights: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        require(Path(self.out).suffix == ".npz", "out", self.out, "a file name ending in .npz")
        require(not Path(self.out).is_dir(), "out", self.out, "the name of a file to write, this is a folder")
        require(self.weights is None or Path(self.weights).is_file(), "weights", self.weights, "a file: no such file")
        for key in ("image_size", "num_images"):
            if getattr(self, key) is not None:
                require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


def main(options: Options) -> None:
    """Write a reference file: statistics of the features of all images of a source, and some of the images.

    Under `accelerate launch`, the processes share the work.
    """
    out = Path(options.out)
    check_place(out)
    with launched(options.device) as (processes, device):
        images = open_data(options, device)
        chosen = choose(len(images), options.num_images, options.seed)
        extractor = create_extractor(options.features, options.weights, device=device)
        check_images("data", images, extractor)
        shape, widths = (len(chosen), *images.image_size, 3), layer_widths(extractor, images.image_size)
        layers = [extractor.features, *([extractor.spatial] if extractor.spatial else [])]
        check_place(out, size=math.prod(shape) + sum(8 * widths[layer] ** 2 for layer in layers))
        if processes.is_main:
            warn_of_few("data", len(images), widths[extractor.features])
        found = statistics_of(images, extractor, processes)
        if not processes.is_main:
            return
        names = images.class_names and [images.class_names[i] for i in range(len(images.class_names))]
        notes = Notes(extractor.name, extractor.weights_sha256, names)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_reference(out, read_chosen(images, chosen), shape, found.pool, found.spatial, notes)
        print(f"{out}: statistics of {len(images)} images, and {len(chosen)} of them")


def open_data(options: Options, device: torch.device) -> ImageSet:
    """The images that a reference is made of.

    Raises:
        InputError: If there are none, they cannot be had at the size, or a VAE is of no use for them.
    """
    store = is_latent_store(options.data)
    if options.vae is not None and not store:
        raise InputError(f"vae={options.vae!r}: {options.data} is no latent store; leave vae out")
    if store:
        images = open_store(options, device)
    elif options.data in NAMED:
        images = _open_named(options)
    elif is_unfinished_store(options.data):
        raise InputError(f"data={options.data}: holds an unfinished latent store; {how_to_encode(options.data)}")
    elif options.image_size is not None:
        with renamed(source="data"):
            dataset = open_images(options.data, options.image_size)
        images = of_dataset(options.data, dataset)
    else:
        images = open_samples(options.data, "data")
    return images


def open_store(options: Options, device: torch.device) -> ImageSet:
    """A latent store's images: the VAE's pictures of its posteriors' means.

    Raises:
        InputError: If the VAE cannot be had or is not one for these latents, or the size is another.
    """
    store = LatentStore(options.data)
    if options.image_size not in (None, store.image_size):
        raise InputError(f"image_size={options.image_size}: {options.data} is of {store.image_size} pixels")
    vae = load_vae(options.vae or store.vae).to(device)
    expected = (vae.config.latent_channels, *[store.image_size // downsampling(vae)] * 2)
    if expected != (store.latent_channels, *store.latent_size):
        raise InputError(
            f"vae={options.vae or store.vae!r}: its latents of {store.image_size} pixels are {expected}, those of "
            f"{options.data} {(store.latent_channels, *store.latent_size)}; wanted the VAE that made them"
        )

    def read_together(indices: Sequence[int]) -> Tensor:
        moments = torch.stack([store.moments(i) for i in indices])
        latents = sample_posterior(vae.config, moments, torch.zeros(()))
        return torch.cat([decode(vae, part.to(device)).cpu() for part in latents.split(DECODED_TOGETHER)])

    size = (store.image_size, store.image_size)
    return ImageSet(options.data, len(store), size, lambda i: read_together([i])[0], read_together=read_together)


def choose(count: int, wanted: int | None, seed: int) -> list[int]:
    """Which images go into the file, in their order; ADM's 10,000 if it is not said how many.

    Raises:
        InputError: If there are not as many.
    """
    if wanted is not None and wanted > count:
        raise InputError(f"num_images={wanted}: there are {count} images; give that or fewer")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: wanted or ADM_IMAGES].sort().values.tolist()


def read_chosen(images: ImageSet, chosen: list[int]) -> Iterator[np.ndarray]:
    """Batches uint8 (n, H, W, 3) of the chosen images."""
    with ThreadPoolExecutor() as readers, progress(total=len(chosen), desc="writing", unit="image") as bar:
        for start in range(0, len(chosen), BATCH_SIZE):
            batch = images.batch(chosen[start : start + BATCH_SIZE], readers)
            yield batch.permute(0, 2, 3, 1).numpy()
            bar.update(len(batch))


def _open_named(options: Options) -> ImageSet:
    name, split = NAMED[options.data]
    size = options.image_size or (DIGITS_SIZE if name == "digits" else None)
    require(size is not None, "image_size", size, f"a size in pixels: {name} have none of their own")
    return of_dataset(options.data, open_images(name, size, split=split))
