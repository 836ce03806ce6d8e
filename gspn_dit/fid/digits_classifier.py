"""The digits classifier that samples are judged by, and the command that trains it (two minutes on one core).

`python -m gspn_dit.fid.digits_classifier --out gspn_dit/weights/digits_classifier.safetensors` makes the packaged one.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from gspn_dit.data import open_images
from gspn_dit.errors import InputError
from gspn_dit.files import replacing
from gspn_dit.options import command, require

NUM_CLASSES = 10
NUM_FEATURES = 64
IMAGE_SIZE = 32
BATCH_SIZE = 64


class DigitsClassifier(nn.Module):
    """A small convolutional network on 32×32 digits: 10 logits, and the 64 features they are linear in."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            _convolution(1, 32, 5, stride=2),  # 16×16
            _convolution(32, 32, 3),
            _convolution(32, 64, 3, stride=2),  # 8×8
            _convolution(64, 64, 3),
            _convolution(64, 96, 3, stride=2),  # 4×4
            nn.Flatten(),
        )
        self.project = nn.Sequential(nn.Dropout(0.3), nn.Linear(96 * 4 * 4, NUM_FEATURES), nn.ReLU())
        self.classify = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (B, 64) of uint8 RGB images (B, 3, 32, 32)."""
        return self.features_of_grey(to_grey(images))

    def features_of_grey(self, grey: Tensor) -> Tensor:
        """Features (B, 64) of float images (B, 1, 32, 32) in [0, 1]."""
        return self.project(self.stages(2 * grey - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of uint8 RGB images (B, 3, 32, 32)."""
        return self.classify(self.features(images))

    @classmethod
    def load(cls, path: str | os.PathLike) -> DigitsClassifier:
        """The classifier of a safetensors file, in eval mode. Raises :class:`InputError` if the file holds another."""
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"weights={path}: not a readable safetensors file ({error})") from error
        model = cls()
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(
                f"weights={path}: not the digits classifier's weights; "
                "`python -m gspn_dit.fid.digits_classifier --out FILE` makes them"
            ) from error
        return model.eval().requires_grad_(False)


def to_grey(images: Tensor) -> Tensor:
    """uint8 RGB images (B, 3, H, W) as grey float images (B, 1, H, W) in [0, 1]."""
    return images.float().mean(dim=1, keepdim=True) / 255


def augment(grey: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly turned, scaled, sheared, shifted, blurred, dimmed and noisy copies of (B, 1, 32, 32) images in [0, 1].

    Handwriting varies in the first four; a generative model's pictures, which have been through a VAE, in the rest.
    """
    count = len(grey)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, shear = uniform(-15, 15) * math.pi / 180, uniform(-0.2, 0.2)
    scale_x, scale_y = uniform(0.85, 1.2), uniform(0.85, 1.2)
    shift_x, shift_y = uniform(-0.12, 0.12), uniform(-0.12, 0.12)
    row_x = torch.stack([angle.cos() * scale_x, (shear - angle.sin()) * scale_y, shift_x], dim=1)
    row_y = torch.stack([angle.sin() * scale_x, angle.cos() * scale_y, shift_y], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(grey.shape), align_corners=False)
    moved = F.grid_sample(grey, grid, padding_mode="border", align_corners=False)

    blurred = F.avg_pool2d(moved, 3, stride=1, padding=1)
    blur, contrast, noise = (uniform(*bounds).view(-1, 1, 1, 1) for bounds in ((-0.5, 1), (0.6, 1.1), (0, 0.08)))
    softened = moved.lerp(blurred, blur.clamp(min=0))
    return (contrast * softened + noise * torch.randn(grey.shape, generator=generator)).clamp(0, 1)


def accuracy(model: DigitsClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images (B, 3, 32, 32) that the model assigns to their labels (B,)."""
    with torch.inference_mode():
        predicted = torch.cat([model(batch).argmax(dim=1) for batch in images.split(256)])
    return (predicted == labels).float().mean().item()


@dataclass
class Options:
    """Training of the digits classifier.

    Args:
        out: The safetensors file to write.
        seed: Seed of the weights, the order and the augmentation.
        epochs: Passes over the 4,500 training images.
    """

    out: str
    seed: int = 0
    epochs: int = 36

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(not Path(self.out).is_dir(), "out", self.out, "the name of a file to write, this is a folder")


def main(options: Options) -> None:
    """Train the classifier of the digits evaluation on the training split, and print its held-out accuracy."""
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    images, labels = _digits("train")
    model = train(images, labels, seed=options.seed, epochs=options.epochs)
    print(f"held-out accuracy: {accuracy(model, *_digits('test')):.2%}")

    with replacing(out) as temporary:
        temporary.write_bytes(save(model.state_dict()))
    print(f"weights: {out} ({out.stat().st_size / 1e6:.2f} MB)")


def train(images: Tensor, labels: Tensor, *, seed: int, epochs: int) -> DigitsClassifier:
    """A classifier of uint8 images (N, 3, 32, 32) with labels (N,), in eval mode; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _train(images, labels, epochs, torch.Generator().manual_seed(seed))


def _train(images: Tensor, labels: Tensor, epochs: int, generator: torch.Generator) -> DigitsClassifier:
    grey = to_grey(images)
    model = DigitsClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = epochs * (len(grey) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    with tqdm(total=steps, unit="step", desc="training") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(grey), generator=generator)
            for batch in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
                features = model.features_of_grey(augment(grey[batch], generator))
                loss = F.cross_entropy(model.classify(features), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval().requires_grad_(False)


def _convolution(channels_in: int, channels_out: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size, stride=stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def _digits(split: str) -> tuple[Tensor, Tensor]:
    """The split's images uint8 (N, 3, 32, 32) and labels (N,)."""
    dataset = open_images("digits", IMAGE_SIZE, split=split)
    images, digits = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(digits)


if __name__ == "__main__":
    command(main, Options, prog="python -m gspn_dit.fid.digits_classifier")
