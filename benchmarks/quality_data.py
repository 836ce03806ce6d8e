"""What `benchmarks.quality` trains on: data sets, how they become latents, and how samples of them are judged."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.reach_task import FarEnds, agreement, reach_gained
from benchmarks.seams import seam_excess
from gspn_dit.autoencoder import decode, encode_moments, load_vae, sample_posterior
from gspn_dit.data import open_images
from gspn_dit.evaluation.extractors import create_extractor
from gspn_dit.evaluation.metrics import ClassAccuracy, frechet_distance
from gspn_dit.evaluation.moments import Moments, Statistics
from gspn_dit.options import require

BATCH_SIZE = 250

# Called with noisy latents (B, C, h, w) on the CPU, a time in [0, 1] and labels (B,); the network's velocity there.
Velocity = Callable[[Tensor, float, Tensor], Tensor]


class Task:
    """A data set as the models see it. `train[i]` and `held_out[i]` are (values, label).

    Attributes:
        name: Its name.
        latent_shape: (C, h, w) of what the models denoise.
        patch_size: Side of a token.
        num_classes: Classes.
        horizontal_flip: Whether training mirrors half of the images.
        figures: What :meth:`judge` and :meth:`judge_network` give: name, how many decimals matter, whether more is
            better.
    """

    name: str
    latent_shape: tuple[int, int, int]
    patch_size: int
    num_classes: int
    horizontal_flip = False
    figures: tuple[tuple[str, int, bool], ...] = ()
    train: Sequence[tuple[Tensor, int]]
    held_out: Sequence[tuple[Tensor, int]]

    def clean(self, values: Tensor, noise: Tensor) -> Tensor:
        """Latents (B, C, h, w) of about unit scale; the noise of that shape is for a VAE's posterior."""
        raise NotImplementedError

    def images(self, latents: Tensor) -> Tensor:
        """Images uint8 (B, 3, H, W) of latents."""
        return ((latents.cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)

    def judge(self, latents: Tensor, labels: Tensor) -> dict[str, float]:
        """The figures of samples (B, C, h, w) that were asked for by labels (B,)."""
        return {}

    def judge_network(self, velocity: Velocity, count: int) -> dict[str, float]:
        """Figures of the network itself, on `count` held-out images."""
        return {}


class Labelled:
    """A sequence of (values, label) as a source of the training stream (:class:`gspn_dit.data.Source`)."""

    latent_shape, condition_names = None, ("class_labels",)

    def __init__(self, pairs: Sequence[tuple[Tensor, int]], num_classes: int) -> None:
        self.pairs, self.class_names = pairs, [str(label) for label in range(num_classes)]

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int, flip: bool = False, names: Collection[str] | None = None) -> dict[str, Tensor]:
        values, label = self.pairs[index]
        return {"image": values.flip(-1) if flip else values, "class_labels": torch.tensor(label)}


class ClassifiedTask(Task):
    """Real images, whose samples the packaged classifier of the data set judges: its features and its classes.

    Attributes:
        image_size: Side of its images in pixels.
        references: How many training images the Fréchet distance is to, None for all.
    """

    figures = (("FD", 1, False), ("class_accuracy", 3, True))
    image_size: int
    references: int | None = None

    @cached_property
    def extractor(self) -> Callable[[Tensor], dict[str, Tensor]]:
        return create_extractor(self.name)

    @cached_property
    def reference(self) -> Statistics:
        """Of the training images, as FID's usually are."""
        moments, images = Moments(64), open_images(self.name, self.image_size)
        for indices in torch.arange(self.references or len(images)).split(BATCH_SIZE):
            batch = torch.stack([images[i][0] for i in indices.tolist()])
            moments.update(indices, self.extractor(batch)["64"])
        return moments.statistics()

    def judge(self, latents: Tensor, labels: Tensor) -> dict[str, float]:
        moments, accuracy = Moments(64), ClassAccuracy(labels)
        images = self.images(latents)
        for indices in torch.arange(len(labels)).split(BATCH_SIZE):
            layers = self.extractor(images[indices])
            moments.update(indices, layers["64"])
            accuracy.update(indices, layers["logits"])
        distance = frechet_distance(moments.statistics(), self.reference)
        return {"FD": distance, "class_accuracy": accuracy.score()}


class DigitsTask(ClassifiedTask):
    """4,500 digits in the packaged VAE's latents, 8×8 tokens; 500 held out."""

    name, image_size = "digits", 32
    latent_shape, patch_size, num_classes = (4, 8, 8), 1, 10

    def __init__(self) -> None:
        self.vae = load_vae("digits")

    @cached_property
    def train(self) -> Sequence[tuple[Tensor, int]]:
        return self._encoded("train")

    @cached_property
    def held_out(self) -> Sequence[tuple[Tensor, int]]:
        return self._encoded("test")

    def _encoded(self, split: str) -> Sequence[tuple[Tensor, int]]:
        digits = open_images("digits", 32, split=split)
        moments = [encode_moments(self.vae, images) for images in digits.images.split(BATCH_SIZE)]
        return list(zip(torch.cat(moments), digits.labels.tolist(), strict=True))

    def clean(self, values: Tensor, noise: Tensor) -> Tensor:
        return sample_posterior(self.vae.config, values, noise)

    def images(self, latents: Tensor) -> Tensor:
        return torch.cat([decode(self.vae, batch).cpu() for batch in latents.cpu().split(BATCH_SIZE)])


class PhotosTask(ClassifiedTask):
    """Crops of 16 photographs in pixels, 64×64, as 32×32 tokens of 2×2; held out are other crops of the same.

    Its seam is that in the middle of both axes, where chunks and windows of 16 tokens end.
    """

    figures = (*ClassifiedTask.figures, ("seam", 3, False))
    name, image_size, references = "photos", 64, 4000
    latent_shape, patch_size, num_classes = (3, 64, 64), 2, 16
    horizontal_flip = True

    def __init__(self) -> None:
        self.train, self.held_out = (open_images("photos", 64, split=split) for split in ("train", "test"))

    def clean(self, values: Tensor, noise: Tensor) -> Tensor:
        return values.float() / 127.5 - 1

    def judge(self, latents: Tensor, labels: Tensor) -> dict[str, float]:
        seam, _ = seam_excess(self.images(latents), self.patch_size, [16])
        return super().judge(latents, labels) | {"seam": seam}


class FashionTask(Task):
    """Fashion-MNIST's 60,000 pictures of clothes (arXiv 1708.07747) in pixels, framed to 32×32, as 16×16 tokens of 2×2.

    Args:
        folder: Where its four files are, as they are published, or unpacked.

    Raises:
        InputError: If one of them is not there.
    """

    name, patch_size, num_classes = "fashion-mnist", 2, 10
    latent_shape = (1, 32, 32)

    def __init__(self, folder: Path) -> None:
        self.train, self.held_out = (self._pairs(folder, split) for split in ("train", "t10k"))

    def _pairs(self, folder: Path, split: str) -> Sequence[tuple[Tensor, int]]:
        images, labels = (read_idx(folder, f"{split}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
        return list(zip(F.pad(images, (2, 2, 2, 2))[:, None], labels.tolist(), strict=True))

    def clean(self, values: Tensor, noise: Tensor) -> Tensor:
        return values.float() / 127.5 - 1


def read_idx(folder: Path, name: str) -> Tensor:
    """The bytes of an IDX file, uint8 in its shape; it may be packed with gzip. Raises :class:`InputError`."""
    plain, packed = folder / name, folder / f"{name}.gz"
    require(plain.exists() or packed.exists(), "data", str(folder), f"a folder with {name} or {name}.gz")
    content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    start = 4 + 4 * content[3]  # the fourth byte counts the dimensions, which follow as big-endian numbers
    shape = np.frombuffer(content[4:start], ">u4").tolist()
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)


class ReachTask(Task):
    """Images whose far ends must agree (:mod:`benchmarks.reach_task`), a token a pixel."""

    patch_size, num_classes = 1, 1
    figures = (("reach_gained", 3, True), ("agreement", 3, True))

    def __init__(self, side: int) -> None:
        self.name, self.latent_shape = f"reach-{side}", (3, side, side)
        self.train, self.held_out = FarEnds(side, "train", 100_000), FarEnds(side, "test", 2_000)

    def clean(self, values: Tensor, noise: Tensor) -> Tensor:
        return values

    def judge(self, latents: Tensor, labels: Tensor) -> dict[str, float]:
        return {"agreement": agreement(latents)}

    def judge_network(self, velocity: Velocity, count: int) -> dict[str, float]:
        images = torch.stack([self.held_out[i][0] for i in range(min(count, len(self.held_out)))])
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        labels = torch.zeros(len(images), dtype=torch.long)
        return {"reach_gained": reach_gained(lambda noisy, t: velocity(noisy, t, labels), images, noise)}


TASKS: dict[str, Callable[[], Task]] = {
    "digits": DigitsTask,
    "photos": PhotosTask,
    "reach-32": lambda: ReachTask(32),
    "reach-64": lambda: ReachTask(64),
}
