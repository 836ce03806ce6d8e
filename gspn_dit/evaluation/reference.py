"""The command that makes a reference file in ADM's format, which the evaluation compares samples with."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("reference", prog="python -m gspn_dit.evaluation.reference")
    raise SystemExit

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gspn_dit.autoencoder import decode, downsampling, load_vae, sample_posterior
from gspn_dit.autoencoder.vae import vae_sha256
from gspn_dit.data import LatentStore, is_latent_store, open_images
from gspn_dit.data.latent_store import how_to_encode, is_unfinished_store
from gspn_dit.data.sources import only_size, split_name
from gspn_dit.errors import InputError, renamed
from gspn_dit.evaluation.evaluate import check_images, statistics_of, warn_of_few
from gspn_dit.evaluation.extractors import create_extractor
from gspn_dit.evaluation.features import BATCH_SIZE, layer_widths
from gspn_dit.evaluation.image_sets import ImageSet, of_dataset, open_samples
from gspn_dit.evaluation.npz import Notes, write_reference
from gspn_dit.options import require
from gspn_dit.processes import launched
from gspn_dit.progress import progress
from gspn_dit.storage.files import check_place

if TYPE_CHECKING:
    from gspn_dit.commands import ReferenceOptions as Options

ADM_IMAGES = 10_000
DECODED_TOGETHER = 8


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
        called = images.class_names
        names = [called[i] for i in range(len(called))] if called else None
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
        raise InputError(
            f"{options.data} is no latent store", argument="vae", value=options.vae, remedy="leave vae out"
        )
    if store:
        images = open_store(options, device)
    elif (named := split_name(options.data)) is not None:
        images = _open_named(options, *named)
    elif is_unfinished_store(options.data):
        raise InputError(
            "holds an unfinished latent store",
            argument="data",
            value=options.data,
            remedy=how_to_encode(options.data),
        )
    elif options.image_size is not None:
        with renamed(source="data"):
            dataset = open_images(options.data, options.image_size, exif_orientation=options.exif_orientation)
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
        raise InputError(
            f"{options.data} is of {store.image_size} pixels", argument="image_size", value=options.image_size
        )
    name = options.vae or store.vae
    vae = load_vae(name).to(device)
    if store.vae_sha256 is not None and vae_sha256(vae)["encoder"] != store.vae_sha256["encoder"]:
        raise InputError(
            f"its weights are not those that {options.data} was encoded with, of {store.vae!r}",
            argument="vae",
            value=name,
            remedy="name that VAE, wherever it lies",
        )
    expected = (vae.config.latent_channels, *[store.image_size // downsampling(vae)] * 2)
    if expected != (store.latent_channels, *store.latent_size):
        raise InputError(
            (
                f"its latents of {store.image_size} pixels are {expected}, those of {options.data} "
                f"{(store.latent_channels, *store.latent_size)}"
            ),
            argument="vae",
            value=name,
            wanted="the VAE that made them",
        )

    def read_together(indices: Sequence[int]) -> Tensor:
        moments = torch.stack([store.moments(i) for i in indices])
        latents = sample_posterior(vae.config, moments, torch.zeros(()))
        return torch.cat([decode(vae, part.to(device)).cpu() for part in latents.split(DECODED_TOGETHER)])

    size = (store.image_size, store.image_size)
    names = dict(enumerate(store.class_names))
    return ImageSet(
        options.data, len(store), size, lambda i: read_together([i])[0], None, read_together, class_names=names
    )


def choose(count: int, wanted: int | None, seed: int) -> list[int]:
    """Which images go into the file, in their order; ADM's 10,000 if it is not said how many.

    Raises:
        InputError: If there are not as many.
    """
    if wanted is not None and wanted > count:
        raise InputError(f"there are {count} images", argument="num_images", value=wanted, remedy="give that or fewer")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: wanted or ADM_IMAGES].sort().values.tolist()


def read_chosen(images: ImageSet, chosen: list[int]) -> Iterator[np.ndarray]:
    """Batches uint8 (n, H, W, 3) of the chosen images."""
    with ThreadPoolExecutor() as readers, progress(total=len(chosen), desc="writing", unit="image") as bar:
        for start in range(0, len(chosen), BATCH_SIZE):
            batch = images.batch(chosen[start : start + BATCH_SIZE], readers)
            yield batch.permute(0, 2, 3, 1).numpy()
            bar.update(len(batch))


def _open_named(options: Options, name: str, split: str) -> ImageSet:
    size = options.image_size or only_size(name)
    require(size is not None, "image_size", size, f"a size in pixels: {name} have none of their own")
    return of_dataset(options.data, open_images(name, size, split=split))
