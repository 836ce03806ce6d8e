"""Options of the commands that train the small VAEs, the small CLIP and the classifiers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gspn_dit.evaluation.classifiers import CLASSIFIERS
from gspn_dit.options import require
from gspn_dit.storage.packaged import PACKAGED_VAES


@dataclass
class SmallVAEOptions:
    """Small VAE: its data and its training.

    What is not given comes from the recipe of the data; a folder has the photos'.

    Args:
        data: Images: `digits`, `photos`, `scenes`, or a folder of images, at any depth.
        out: Folder to write, in diffusers' layout; it must not exist yet.
        image_size: For a folder: side in pixels of the images that the diffusion model will learn.
        steps: Optimiser steps.
        batch_size: Images per step.
        learning_rate: Peak learning rate of AdamW; it falls to 0 along a cosine.
        warmup_steps: Steps over which the learning rate rises first.
        mixed_precision: `auto` trains in bf16 where this CPU has instructions for it and in float32 elsewhere; or `no`
            (float32), or `bf16`.
        kl_weight: Weight of the posterior's KL divergence per latent value, against the error per pixel.
        latent_noise: Standard deviation of the noise that is added to latents before decoding, in units of the
            latents' own.
        seed: Seed of the weights and every draw.
    """

    data: str
    out: str
    image_size: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    mixed_precision: Literal["auto", "no", "bf16"] | None = None
    kl_weight: float = 1e-3
    latent_noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.data in PACKAGED_VAES:
            require(self.image_size is None, "image_size", self.image_size, f"none: {self.data} have theirs")
        elif self.image_size is not None:
            good = self.image_size >= 16 and self.image_size % 4 == 0
            require(good, "image_size", self.image_size, "a multiple of 4 pixels from 16")
        for key in ("steps", "batch_size"):
            require(getattr(self, key) is None or getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key in ("warmup_steps", "kl_weight", "latent_noise"):
            require(getattr(self, key) is None or getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        rate = self.learning_rate
        require(rate is None or rate > 0, "learning_rate", rate, "a positive number")


@dataclass
class SmallCLIPOptions:
    """Small CLIP: its training on `scenes`.

    Args:
        out: Folder to write, of a CLIPTextModel; it must not exist yet.
        steps: Optimiser steps.
        batch_size: Scenes per step.
        learning_rate: Peak learning rate of AdamW; it rises over 100 steps and falls to 0 along a cosine.
        seed: Seed of the weights and every draw.
    """

    out: str
    steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "1 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more: one is told from others")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")


@dataclass
class ClassifierOptions:
    """Classifier: its data and its training.

    Args:
        data: The data set, which has a classifier: `digits` or `photos`.
        out: The safetensors file to write.
        seed: Seed of the weights, the order and the augmentation.
        epochs: Passes over the training images; if not given, 36 for the digits and 4 for the photos.
    """

    data: str
    out: str
    seed: int = 0
    epochs: int | None = None

    def __post_init__(self) -> None:
        require(self.data in CLASSIFIERS, "data", self.data, f"a data set with a classifier: {', '.join(CLASSIFIERS)}")
        require(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(not Path(self.out).is_dir(), "out", self.out, "the name of a file to write, this is a folder")
