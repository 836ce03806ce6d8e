"""The classifiers that samples of digits and photos are judged by, and the command that trains one (minutes on a core).

`gspn-dit classifier --data photos --out gspn_dit/demo/weights/photos_classifier.safetensors` makes a
packaged one.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("classifier", prog="python -m gspn_dit.demo.classifier")
    raise SystemExit

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gspn_dit.data import open_images
from gspn_dit.demo.photos import PHOTOGRAPHS
from gspn_dit.errors import InputError
from gspn_dit.evaluation.classifiers import CLASSIFIERS
from gspn_dit.progress import figure, progress
from gspn_dit.storage.files import check_place, replacing, save_tensors

if TYPE_CHECKING:
    from gspn_dit.commands import ClassifierOptions as Options

BATCH_SIZE = 64


class Classifier(nn.Module):
    """A small convolutional network: logits of a data set's classes, and the 64 features they are linear in.

    Attributes:
        data: The data set.
        class_names: Its classes, by the logits' order.
        num_features: How many features there are: 64.
        image_size: Side of the images it was trained on, in pixels.
        only_size: The only side of images it takes, in pixels, or None for any.
        epochs: Passes over the training images that the packaged weights were given.
    """

    data: str
    class_names: Sequence[str]
    num_features: int = 64
    image_size: int
    only_size: int | None = None
    epochs: int

    def __init__(self) -> None:
        super().__init__()
        stages, width = self.make_stages()
        self.stages = nn.Sequential(*stages, nn.Flatten())
        self.project = nn.Sequential(nn.Dropout(0.3), nn.Linear(width, self.num_features), nn.ReLU())
        self.classify = nn.Linear(self.num_features, len(self.class_names))

    def make_stages(self) -> tuple[list[nn.Sequential], int]:
        """The convolutions, and how many values an image has after them."""
        raise NotImplementedError

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 RGB images (B, 3, H, W) as the network takes them: float (B, c, image_size, image_size) in [0, 1]."""
        raise NotImplementedError

    def augment(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Randomly altered copies of prepared images."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (B, 64) of uint8 RGB images (B, 3, H, W)."""
        return self.features_of(self.prepare(images))

    def features_of(self, pixels: Tensor) -> Tensor:
        """Features (B, 64) of prepared images."""
        return self.project(self.stages(2 * pixels - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of uint8 RGB images (B, 3, H, W)."""
        return self.classify(self.features(images))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """The classifier of a safetensors file, in eval mode. Raises :class:`InputError` if the file holds another."""
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"not a readable safetensors file ({error})", argument="weights", value=path) from error
        model = cls()
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(
                f"not the {cls.data} classifier's weights",
                argument="weights",
                value=path,
                remedy=f"`gspn-dit classifier --data {cls.data} --out FILE` makes them",
            ) from error
        return model.eval().requires_grad_(False)


class DigitsClassifier(Classifier):
    """Of 32×32 digits, in grey."""

    data, class_names, image_size, epochs = "digits", tuple("0123456789"), 32, 36
    only_size = image_size

    def make_stages(self) -> tuple[list[nn.Sequential], int]:
        stages = [
            _convolution(1, 32, 5, stride=2),  # 16×16
            _convolution(32, 32, 3),
            _convolution(32, 64, 3, stride=2),  # 8×8
            _convolution(64, 64, 3),
            _convolution(64, 96, 3, stride=2),  # 4×4
        ]
        return stages, 96 * 4 * 4

    def prepare(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=1, keepdim=True) / 255

    def augment(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Turned, scaled, sheared, shifted, blurred, dimmed and noisy copies.

        Handwriting varies in the first four; a generative model's pictures, which have been through a VAE, in the rest.
        """
        count = len(pixels)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        angle, shear = uniform(-15, 15) * math.pi / 180, uniform(-0.2, 0.2)
        scale_x, scale_y = uniform(0.85, 1.2), uniform(0.85, 1.2)
        shift_x, shift_y = uniform(-0.12, 0.12), uniform(-0.12, 0.12)
        row_x = torch.stack([angle.cos() * scale_x, (shear - angle.sin()) * scale_y, shift_x], dim=1)
        row_y = torch.stack([angle.sin() * scale_x, angle.cos() * scale_y, shift_y], dim=1)
        grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(pixels.shape), align_corners=False)
        moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
        return soften(moved, generator, contrast=(0.6, 1.1), noise=0.08)


class PhotosClassifier(Classifier):
    """Of crops of the 16 photographs at 64×64 pixels; crops of other sizes are resized to that."""

    data, class_names, image_size, epochs = "photos", tuple(PHOTOGRAPHS), 64, 4

    def make_stages(self) -> tuple[list[nn.Sequential], int]:
        stages = [
            _convolution(3, 32, 5, stride=2),  # 32×32
            _convolution(32, 48, 3, stride=2),  # 16×16
            _convolution(48, 64, 3, stride=2),  # 8×8
            _convolution(64, 64, 3),
            _convolution(64, 80, 3, stride=2),  # 4×4
        ]
        return stages, 80 * 4 * 4

    def prepare(self, images: Tensor) -> Tensor:
        pixels, size = images.float() / 255, (self.image_size, self.image_size)
        if pixels.shape[2:] == size:
            return pixels
        return F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)

    def augment(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Mirrored, tinted, blurred, dimmed and noisy copies: the crops themselves vary in position and scale."""
        mirrored = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
        tint = 0.9 + 0.2 * torch.rand(len(pixels), 3, 1, 1, generator=generator)
        pixels = torch.where(mirrored, pixels.flip(3), pixels)
        return soften(tint * pixels, generator, contrast=(0.8, 1.2), noise=0.04)


def soften(pixels: Tensor, generator: torch.Generator, *, contrast: tuple[float, float], noise: float) -> Tensor:
    """Copies of (B, C, H, W) images in [0, 1]: two thirds of them blurred, all scaled by a contrast and noisy."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(pixels), generator=generator)

    blurred = F.avg_pool2d(pixels, 3, stride=1, padding=1)
    blur, scale, grain = (uniform(*bounds).view(-1, 1, 1, 1) for bounds in ((-0.5, 1), contrast, (0, noise)))
    softened = pixels.lerp(blurred, blur.clamp(min=0))
    return (scale * softened + grain * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images (B, 3, H, W) that the model assigns to their labels (B,)."""
    with torch.inference_mode():
        predicted = torch.cat([model(batch).argmax(dim=1) for batch in images.split(256)])
    return (predicted == labels).float().mean().item()


def main(options: Options) -> None:
    """Train the classifier of a data set on its training split, and print its held-out accuracy."""
    out = Path(options.out)
    check_place(out)
    kind = CLASSIFIERS.load(options.data)
    epochs = options.epochs or kind.epochs
    model = train(kind, *images_and_labels(kind, "train"), seed=options.seed, epochs=epochs)
    print(f"held-out accuracy: {accuracy(model, *images_and_labels(kind, 'test')):.2%}")

    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        save_tensors(model.state_dict(), temporary)
    print(f"weights: {out} ({out.stat().st_size / 1e6:.2f} MB)")


def train(kind: type[Classifier], images: Tensor, labels: Tensor, *, seed: int, epochs: int) -> Classifier:
    """A classifier of uint8 images (N, 3, H, W) with labels (N,), in eval mode; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _train(kind().train(), images, labels, epochs, torch.Generator().manual_seed(seed))


def images_and_labels(kind: type[Classifier], split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """A split's first images, or all: uint8 (N, 3, image_size, image_size) and labels (N,)."""
    dataset = open_images(kind.data, kind.image_size, split=split)
    images, labels = zip(*(dataset[i] for i in range(count or len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def _train(model: Classifier, images: Tensor, labels: Tensor, epochs: int, generator: torch.Generator) -> Classifier:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = epochs * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    with progress(total=steps, unit="step", desc="training") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for batch in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
                features = model.features_of(model.augment(model.prepare(images[batch]), generator))
                loss = F.cross_entropy(model.classify(features), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix_str(f"loss {figure(loss.item())}", refresh=False)
    return model.eval().requires_grad_(False)


def _convolution(channels_in: int, channels_out: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size, stride=stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )
