"""The stream of a diffusion training: item n is a function of (seed, n) alone.

Everything random about a sample (which image, its mirroring, the posterior's and the diffusion's noise, its time,
whether its condition is dropped) is drawn from a counter-based generator keyed by (seed, n). So a run continues exactly
from its step number, and sees the same samples whatever the number of processes, workers or accumulation steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gspn_dit.config import DataConfig
from gspn_dit.data import ImageDataset, LatentStore, Source, how_to_encode, is_latent_store, open_images
from gspn_dit.data.sources import SOURCES
from gspn_dit.errors import InputError
from gspn_dit.registry import quoted
from gspn_dit.training.positions import EpochOrder, generator_at


def open_source(
    config: DataConfig, seed: int, open_images: Callable[..., ImageDataset] = open_images
) -> ImageDataset | LatentStore:
    """The images or the latent store that a configuration names.

    Args:
        config: Of the data.
        seed: Of what is random in it.
        open_images: Opens images that are no store: :func:`gspn_dit.data.open_images`, or as that.

    Raises:
        InputError: If it is not there, or a store was made for another image size or mirroring.
    """
    if config.source not in SOURCES and not Path(config.source).exists():
        raise InputError(
            "no such folder",
            argument="data.source",
            value=config.source,
            remedy=(
                f"give {quoted(SOURCES)}, a folder of class/*.jpg or a latent store; {how_to_encode(config.source)}"
            ),
        )
    if not is_latent_store(config.source):
        return open_images(config.source, config.image_size, seed=seed, exif_orientation=config.exif_orientation)
    store = LatentStore(config.source)
    if store.image_size != config.image_size:
        raise InputError(
            f"{config.source} holds {store.image_size}-pixel images",
            argument="data.image_size",
            value=config.image_size,
        )
    if config.horizontal_flip and not store.flipped:
        raise InputError(
            f"{config.source} has no mirrored latents",
            argument="data.horizontal_flip",
            value=True,
            remedy="encode with --horizontal-flip true, or train with --data.horizontal-flip false",
        )
    if config.exif_orientation and not store.manifest.get("exif_orientation"):
        raise InputError(
            f"{config.source} was encoded without",
            argument="data.exif_orientation",
            value=True,
            remedy="encode with --exif-orientation true",
        )
    return store


class TrainingStream(Dataset):
    """An endless sequence of training samples; every epoch is a new permutation of the source.

    Item n is a dictionary: what the source gives of the image, `moments` (2C, h, w) or `image` uint8 (3, H, W);
    `posterior_noise` and `noise` (C, h, w) standard normal; `u` uniform in [0, 1), for the time; `condition`, a
    dictionary of tensors by name; and `drop`, a bool, whether the null condition is to take its place.

    Args:
        source: Images or latents.
        latent_shape: (C, h, w) of the noise.
        condition_names: Which of the source's tensors the condition is made of.
        dropout: Share of conditions to drop.
        horizontal_flip: Mirror half of the images.
        seed: Of everything random.

    Raises :class:`InputError` if the source has no tensor of a name.
    """

    def __init__(
        self,
        source: Source,
        *,
        latent_shape: tuple[int, int, int],
        condition_names: tuple[str, ...],
        dropout: float,
        horizontal_flip: bool,
        seed: int,
    ) -> None:
        for name in condition_names:
            if name not in source.condition_names:
                raise InputError(
                    f"the data holds {', '.join(source.condition_names)}",
                    argument="condition_names",
                    value=condition_names,
                    remedy=f"give a latent store that was encoded with {name!r}",
                )
        self.source = source
        self.latent_shape = latent_shape
        self.condition_names = condition_names
        self.dropout = dropout
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        self.order = EpochOrder(len(source), seed)

    def __getitem__(self, n: int) -> dict[str, Tensor | dict[str, Tensor]]:
        rng = generator_at(self.seed, n)
        flip = self.horizontal_flip and rng.random() < 0.5
        drop = rng.random() < self.dropout
        u = rng.random(dtype=np.float32)
        posterior_noise, noise = rng.standard_normal((2, *self.latent_shape), dtype=np.float32)
        sample = self.source.sample(self.order(n), flip, self.condition_names)
        known = {name: sample.pop(name) for name in self.source.condition_names if name in sample}
        return sample | {
            "posterior_noise": torch.from_numpy(posterior_noise),
            "noise": torch.from_numpy(noise),
            "u": torch.tensor(u),
            "condition": {name: known[name] for name in self.condition_names},
            "drop": torch.tensor(drop),
        }
