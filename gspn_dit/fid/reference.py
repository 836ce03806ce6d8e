"""The command that makes a reference file in ADM's format, which the evaluation compares samples with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

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
from gspn_dit.fid.evaluate import make_folder_of, warn_of_few
from gspn_dit.fid.extractors import create_extractor
from gspn_dit.fid.features import BATCH_SIZE, layer_widths, observe
from gspn_dit.fid.images import NAMED, ImageSet, open_samples
from gspn_dit.fid.moments import Moments
from gspn_dit.fid.npz import write_reference
from gspn_dit.fid.processes import launched
from gspn_dit.options import require

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
        exif_orientation: Turn those of such a folder as their EXIF orientation says, as for a training that did.
        num_images: How many images go into the file, for precision and recall, drawn at random; null takes ADM's
            10000, or all if there are fewer. The statistics are of all images.
        seed: Of the draw.
        vae: What decodes a latent store; null takes the VAE that made it.
        weights: Inception's weights file; null takes torch-fidelity's download.
        device: `auto` takes the accelerator if there is one, and each process of `accelerate launch` its own.
    """

    data: str
    out: str
    image_size: int | None = None
    exif_orientation: bool = False
    num_images: int | None = None
    seed: int = 0
    vae: str | None = None
    weights: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        require(Path(self.out).suffix == ".npz", "out", self.out, "a file name ending in .npz")
        require(not Path(self.out).is_dir(), "out", self.out, "the name of a file to write, this is a folder")
        require(self.weights is None or Path(self.weights).is_file(), "weights", self.weights, "a file: no such file")
        for key in ("image_size", "num_images"):
            if getattr(self, key) is not None:
                require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        cropped = self.image_size is not None or not self.exif_orientation
        require(cropped, "exif_orientation", self.exif_orientation, "image_size with it: other images are as they are")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


def main(options: Options) -> None:
    """Write a reference file: FID's and sFID's statistics of all images of a source, and some of the images.

    Under `accelerate launch`, the processes share the work.
    """
    out = Path(options.out)
    make_folder_of(out)
    with launched(options.device) as (processes, device):
        images = open_data(options, device)
        chosen = choose(len(images), options.num_images, options.seed)
        extractor = create_extractor("inception", options.weights, device=device)
        widths = layer_widths(extractor, images.image_size)
        pool, spatial = (Moments(widths[layer], device) for layer in (extractor.features, extractor.spatial))
        if processes.is_main:
            warn_of_few("data", len(images), widths[extractor.features])
        observe(images, extractor, [(extractor.features, pool), (extractor.spatial, spatial)], processes)
        if not processes.is_main:
            return
        shape = (len(chosen), *images.image_size, 3)
        try:
            write_reference(out, read_chosen(images, chosen), shape, pool.statistics(), spatial.statistics())
        except OSError as error:
            raise InputError(f"out={out}: cannot be written ({error.strerror})") from error
        print(f"{out}: statistics of {len(images)} images, and {len(chosen)} of them")


def open_data(options: Options, device: torch.device) -> ImageSet:
    """The images that a reference is made of.

    Raises:
        InputError: If there are none or fewer than 2, they cannot be had at the size, or a VAE is of no use for them.
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
            dataset = open_images(options.data, options.image_size, exif_orientation=options.exif_orientation)
        images = ImageSet(options.data, len(dataset), (options.image_size,) * 2, lambda i: dataset[i][0])
    else:
        images = open_samples(options.data, "data")
    if len(images) < 2:
        raise InputError(f"data={options.data}: holds 1 image; a Fréchet distance needs 2 or more")
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
    with ThreadPoolExecutor() as readers, tqdm(total=len(chosen), desc="writing", unit="image") as bar:
        for start in range(0, len(chosen), BATCH_SIZE):
            batch = images.batch(chosen[start : start + BATCH_SIZE], readers)
            yield batch.permute(0, 2, 3, 1).numpy()
            bar.update(len(batch))


def _open_named(options: Options) -> ImageSet:
    name, split = NAMED[options.data]
    size = options.image_size or (DIGITS_SIZE if name == "digits" else None)
    require(size is not None, "image_size", size, f"a size in pixels: {name} have none of their own")
    dataset = open_images(name, size, split=split)
    return ImageSet(options.data, len(dataset), (size, size), lambda i: dataset[i][0])
