"""The streams of a classifier's training: item n is a function of (seed, n), and of (seed, step) how images are mixed.

timm's augmentations draw from Python's, NumPy's and torch's global generators. Each is set for one image, or for one
step, and set back; so a resumed run, and any number of processes and workers, sees the same images.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from gspn_dit.classifier_config import AugmentationConfig
from gspn_dit.data.pictures import Pictures, readable
from gspn_dit.data.preparation import Preparation
from gspn_dit.errors import InputError
from gspn_dit.training.positions import EpochOrder, generator_at

_STEPS = 1 << 62  # keys from here up are steps, of which the shifts are drawn
_SIZES = _STEPS + (1 << 61)  # keys from here up, and below epochs' orders, are steps, of which the sizes are drawn

Samples = dict[str, Tensor]
"""`images` float32 (B, C, H, W), normalised, and `labels` int64 (B,)."""


@contextmanager
def global_draws(*key: int) -> Iterator[None]:
    """In the block, what is drawn from global generators is a function of the key, and nothing outside it changes."""
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(3)]
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (timm draws from it)
    random.seed(words[0])
    np.random.seed(words[1])  # noqa: NPY002
    torch.default_generator.manual_seed(words[2])  # of the CPU alone
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


class ResizedImages(Dataset):
    """Random parts of pictures, altered one by one by timm's training transforms: item n is `image` and `label`.

    Args:
        pictures: What is learned from.
        preparation: Size and normalisation.
        options: How pictures are altered.
        seed: Of everything random.

    Raises :class:`InputError` for a RandAugment that timm does not know.
    """

    def __init__(self, pictures: Pictures, preparation: Preparation, options: AugmentationConfig, seed: int) -> None:
        from timm.data import create_transform  # takes seconds

        self.pictures, self.preparation, self.seed = pictures, preparation, seed
        self.order = EpochOrder(len(pictures), seed)
        try:
            self.transform = create_transform(
                preparation.image_size,
                is_training=True,
                scale=options.scale,
                ratio=options.ratio,
                hflip=options.horizontal_flip,
                color_jitter=options.color_jitter,
                auto_augment=options.rand_augment,
                interpolation=options.interpolation,
                mean=preparation.mean,
                std=preparation.std,
                re_prob=options.erasing,
                re_mode=options.erasing_mode,
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise InputError(
                f"timm does not take it ({' '.join(str(error).split()) or type(error).__name__})",
                argument="augmentation.rand_augment",
                value=options.rand_augment,
                wanted="a name such as rand-m9-mstd0.5-inc1",
            ) from error
        keep_a_bit(self.transform)

    def __getitem__(self, n: int) -> Samples:
        picture, label = readable(self.pictures, self.order(n))
        with global_draws(self.seed, n):
            image = self.transform(self.preparation.mode(picture))
        return {"images": image, "labels": torch.tensor(label)}

    collate: Callable[[Any], Any] = staticmethod(torch.utils.data.default_collate)


def keep_a_bit(transform: Any) -> None:
    """Have timm's posterising keep one bit of a colour at the least.

    At the greatest magnitude it asks for none, which Pillow refuses; older ones made the picture black.

    Args:
        transform: timm's, which is changed.
    """
    for step in transform.transforms:
        operations = [*getattr(step, "ops", ()), *(op for policy in getattr(step, "policy", ()) for op in policy)]
        for operation in operations:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(picture: Image.Image, bits: int, **_: object) -> Image.Image:
    return picture if bits >= 8 else ImageOps.posterize(picture, max(bits, 1))


class ShiftedImages(Dataset):
    """Pictures in memory, moved and mirrored a micro-batch at a time; it is asked for all positions of one at once.

    Args:
        pictures: What is learned from, in memory.
        preparation: Size and normalisation.
        options: How pictures are altered.
        seed: Of everything random.
        batch_size: Images per step, over all processes.

    Raises :class:`InputError` for pictures that are not in memory at that size.
    """

    def __init__(
        self,
        pictures: Pictures,
        preparation: Preparation,
        options: AugmentationConfig,
        seed: int,
        batch_size: int,
    ) -> None:
        size = preparation.image_size
        if pictures.array is None or pictures.array.shape[1:] != (preparation.channels, size, size):
            raise InputError(
                f"takes images that are in memory at data.image_size={size}, as idx files of that size are",
                argument="augmentation.crop",
                value="shift",
                remedy="give resized",
            )
        self.pictures, self.array = pictures, pictures.array
        self.labels = torch.tensor([pictures.label(i) for i in range(len(pictures))])
        self.preparation, self.options, self.seed, self.batch_size = preparation, options, seed, batch_size
        self.order = EpochOrder(len(pictures), seed)
        self.erase: Callable[[Tensor], Tensor] | None = None
        if options.erasing:
            from timm.data.random_erasing import RandomErasing

            self.erase = RandomErasing(1.0, mode=options.erasing_mode, device="cpu")

    def __getitems__(self, positions: Sequence[int]) -> Samples:
        """The samples at positions of one step, together."""
        places = np.asarray(positions)
        step, (index,) = int(places[0]) // self.batch_size, (torch.from_numpy(self.order.many(places)),)
        rows = places - step * self.batch_size
        draws, shift, size = generator_at(self.seed, _STEPS + step), self.options.max_shift, self.preparation.image_size
        # of the whole step, so that they do not depend on how it is split
        moved = torch.from_numpy(draws.integers(0, 2 * shift + 1, (2, self.batch_size))[:, rows])
        chances = draws.random((2, self.batch_size))[:, rows]
        pixels = self.array[index]
        if shift:
            pixels = F.pad(pixels, (shift,) * 4)
            down, right = (offset[:, None] + torch.arange(size) for offset in moved)  # (B, size)
            picture = torch.arange(len(rows))[:, None, None]
            pixels = pixels[picture, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)
        mirrored = torch.from_numpy(chances[0] < self.options.horizontal_flip)
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        images = self.preparation.normalise(pixels).contiguous()
        if self.erase is not None:
            for row in np.flatnonzero(chances[1] < self.options.erasing):
                with global_draws(self.seed, int(places[row])):
                    self.erase(images[row])
        return {"images": images, "labels": self.labels[index]}

    @staticmethod
    def collate(samples: Samples) -> Samples:
        """They are together already."""
        return samples


class Mixing:
    """timm's mixup and cutmix, of each image with its neighbour: positions 2k and 2k + 1.

    Neighbours are in one micro-batch however a step is split, and how much is mixed is drawn for the whole step.

    Args:
        options: How images are mixed.
        num_classes: How many classes there are.
        seed: Of everything random.
    """

    def __init__(self, options: AugmentationConfig, num_classes: int, seed: int) -> None:
        from timm.data import Mixup

        self.seed = seed
        self.mixup = Mixup(
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            prob=options.mix_probability,
            switch_prob=options.cutmix_probability,
            label_smoothing=options.label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mixed images and their targets (B, classes), in another order than they came in.

        Args:
            images: (B, C, H, W) of an even number B of positions that follow each other.
            labels: (B,).
            step: Which of them it is.
        """
        # timm mixes the first with the last, the second with the one before it, …
        images, labels = (torch.cat([each[0::2], each[1::2].flip(0)]) for each in (images, labels))
        with global_draws(self.seed, step, 1):
            return self.mixup(images, labels)


class Resizing:
    """All images of a step at one size, which is drawn for the step: a classifier of all its sizes learns from it.

    The logarithm of the side is uniform, so that half the size is as likely as twice the size.

    Args:
        sizes: Smallest and largest side in pixels.
        seed: Of everything random.
    """

    def __init__(self, sizes: tuple[int, int], seed: int) -> None:
        self.sizes, self.seed = sizes, seed

    def side(self, step: int) -> int:
        """The side in pixels of a step's images."""
        low, high = self.sizes
        return round(low * (high / low) ** generator_at(self.seed, _SIZES + step).random())

    def __call__(self, images: Tensor, step: int) -> Tensor:
        """A step's images (B, C, H, W) as (B, C, side, side), without aliasing."""
        return F.interpolate(images, size=(self.side(step),) * 2, mode="bilinear", antialias=True)
