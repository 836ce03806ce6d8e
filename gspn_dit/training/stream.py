"""The training stream: item n is a function of (seed, n) alone.

Everything random about a sample (which image, its mirroring, the posterior's and the diffusion's noise, its time,
whether its condition is dropped) is drawn from a counter-based generator keyed by (seed, n). So a run continues exactly
from its step number, and sees the same samples whatever the number of processes, workers or accumulation steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from gspn_dit.config import DataConfig
from gspn_dit.data import LatentStore, Source, how_to_encode, is_latent_store, open_images
from gspn_dit.data.sources import SOURCES
from gspn_dit.errors import InputError
from gspn_dit.registry import quoted

_ORDER = 1 << 63  # keys from here up are epochs' orders, below are samples


def open_source(config: DataConfig, seed: int) -> Source:
    """The images or the latent store that a configuration names.

    Raises:
        InputError: If it is not there, or a store was made for another image size or mirroring.
    """
    if config.source not in SOURCES and not Path(config.source).is_dir():
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
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, n: int) -> dict[str, Tensor | dict[str, Tensor]]:
        epoch, position = divmod(n, len(self.source))
        index = int(self._order(epoch)[position])
        rng = self._rng(n)
        flip = self.horizontal_flip and rng.random() < 0.5
        drop = rng.random() < self.dropout
        u = rng.random(dtype=np.float32)
        posterior_noise, noise = rng.standard_normal((2, *self.latent_shape), dtype=np.float32)
        sample = self.source.sample(index, flip, self.condition_names)
        known = {name: sample.pop(name) for name in self.source.condition_names if name in sample}
        return sample | {
            "posterior_noise": torch.from_numpy(posterior_noise),
            "noise": torch.from_numpy(noise),
            "u": torch.tensor(u),
            "condition": {name: known[name] for name in self.condition_names},
            "drop": torch.tensor(drop),
        }

    def _shuffled(self, epoch: int) -> np.ndarray:
        return self._rng(_ORDER + epoch).permutation(len(self.source))

    def _rng(self, key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, key], dtype=np.uint64)))

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._shuffled)


class StepSampler(Sampler):
    """The stream positions of this process's micro-batches, for steps [first, last): step s is positions [sB, sB + B).

    Args:
        first: Step to begin with.
        last: Step to end before.
        batch_size: B, over all processes and accumulation steps.
        accumulation: Micro-batches per step.
        rank: This process.
        processes: How many there are.

    Raises:
        InputError: If the batch does not split evenly.
    """

    def __init__(self, first: int, last: int, *, batch_size: int, accumulation: int, rank: int, processes: int) -> None:
        self.first, self.last = first, last
        self.batch_size, self.accumulation, self.rank, self.processes = batch_size, accumulation, rank, processes
        self.micro_batch, rest = divmod(batch_size, accumulation * processes)
        if rest:
            raise InputError(
                argument="training.batch_size",
                value=batch_size,
                wanted=(
                    f"a multiple of {accumulation * processes} ({accumulation} accumulation steps × "
                    f"{processes} processes)"
                ),
            )

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            for micro in range(self.accumulation):
                start = step * self.batch_size + (micro * self.processes + self.rank) * self.micro_batch
                yield list(range(start, start + self.micro_batch))

    def __len__(self) -> int:
        return max(0, self.last - self.first) * self.accumulation
