"""The typed configuration of a classifier's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gspn_dit.arguments import default_workers
from gspn_dit.config import LoopConfig, ModelConfig, RunConfig
from gspn_dit.data.sources import SOURCES
from gspn_dit.options import require
from gspn_dit.storage.packaged import absolute

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass
class ClassifierModelConfig(ModelConfig):
    """Model: its name, sizes and first weights.

    Args:
        name: A classifier's, for example `gspn-t`; `gspn-dit models` lists them.
        overrides: Constructor arguments to change, for example `{mixer: attention, drop_path_rate: 0.1}`.
        init_from: A run, a checkpoint or a model folder whose averaged weights a new run begins with; with other
            classes the head begins anew. If not given, weights are random.
    """

    name: str = "gspn-t"


@dataclass
class ClassifierDataConfig:
    """Data: labelled images to learn from, and others to be judged by.

    Args:
        source: A folder with `train/` and `val/` in it, each of `class/*.jpg`; a folder of idx files, as MNIST and
            Fashion-MNIST are shipped; or a named source: `digits`, `photos`.
        validation: A folder of `class/*.jpg` in place of the source's own validation images.
        class_names: Names of the classes, for idx files, which have numbers only.
        image_size: Side in pixels of the square images that the network learns from.
        mean: What is subtracted from each channel, of values from 0 to 1; if not given, the model's.
        std: What each channel is then divided by; if not given, the model's.
        num_workers: Processes that read data, per training process; 0 reads in the training process itself. If not
            given, one for each core, up to 4.
    """

    source: str = "data/imagenet"
    validation: str | None = None
    class_names: list[str] | None = None
    image_size: int = 224
    mean: list[float] | None = None
    std: list[float] | None = None
    num_workers: int = field(default_factory=default_workers)

    def __post_init__(self) -> None:
        require(self.image_size >= 1, "data.image_size", self.image_size, "a positive number of pixels")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")
        positive = self.std is None or all(value > 0 for value in self.std)
        require(positive, "data.std", self.std, "positive numbers")
        self.source = absolute(self.source, SOURCES)
        if self.validation is not None:
            self.validation = absolute(self.validation)


@dataclass
class AugmentationConfig:
    """Augmentation: how training images are altered; everything random is a function of the seed and the position.

    Args:
        crop: `resized` takes a random part of each image at the training size, by timm's transforms; `shift` moves
            images that are in memory at that size, a batch at a time, and takes neither colour jitter nor RandAugment.
        scale: For `resized`: smallest and largest share of an image's area.
        ratio: For `resized`: smallest and largest ratio of its sides.
        max_shift: For `shift`: pixels by which an image moves at most; what comes in is black.
        interpolation: For `resized`: how it is resampled.
        sizes: Smallest and largest side in pixels that a step's images are resized to, all to one side, which is drawn
            for the step; null leaves them as they are. Blocks are then not compiled, and steps are no CUDA graph.
        horizontal_flip: Share of images that are mirrored.
        color_jitter: Strength of random brightness, contrast and saturation; with RandAugment, timm leaves it out.
        rand_augment: timm's name of an automatic augmentation, for example `rand-m9-mstd0.5-inc1`; null for none.
        erasing: Share of images of which a rectangle is erased.
        erasing_mode: What is there instead: `pixel` noise, one `rand` colour, or `const` (the mean).
        mixup: Both parameters of mixup's beta distribution; 0 for no mixup.
        cutmix: Both parameters of cutmix's beta distribution; 0 for no cutmix.
        mix_probability: Share of steps whose images are mixed.
        cutmix_probability: Share of these that are mixed by cutmix, where there are both.
        label_smoothing: Share of a label's weight that is spread over all classes.
    """

    crop: Literal["resized", "shift"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    max_shift: int = 0
    interpolation: Interpolation = "bicubic"
    sizes: tuple[int, int] | None = None
    horizontal_flip: float = 0.5
    color_jitter: float = 0.4
    rand_augment: str | None = None
    erasing: float = 0.0
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    cutmix_probability: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for key in ("horizontal_flip", "erasing", "mix_probability", "cutmix_probability", "label_smoothing"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"augmentation.{key}", value, "a share from 0 to 1")
        for key in ("max_shift", "color_jitter", "mixup", "cutmix"):
            value = getattr(self, key)
            require(value >= 0, f"augmentation.{key}", value, "0 or more")
        for key, most in (("scale", 1.0), ("ratio", 100.0)):
            low, high = getattr(self, key)
            within = 0 < low <= high <= most
            require(within, f"augmentation.{key}", (low, high), f"two numbers, 0 < low <= high <= {most:g}")
        if self.sizes is not None:
            low, high = self.sizes
            require(0 < low <= high, "augmentation.sizes", self.sizes, "two numbers of pixels, 0 < low <= high")
        if self.crop == "shift":
            only = "none where images are shifted (augmentation.crop=shift)"
            require(self.color_jitter == 0, "augmentation.color_jitter", self.color_jitter, only)
            require(self.rand_augment is None, "augmentation.rand_augment", self.rand_augment, only)
        else:
            wanted = "0 where images are cropped and resized (augmentation.crop=resized)"
            require(self.max_shift == 0, "augmentation.max_shift", self.max_shift, wanted)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0


@dataclass
class ClassifierTrainingConfig(LoopConfig):
    """Training: steps, optimiser, averages, and what is written when.

    Args:
        max_steps: Optimiser steps in total, in place of `epochs`; 0 for as many as these take.
        epochs: Passes over the training images.
        warmup_epochs: Passes of warm-up, in place of `warmup_steps`; 0 for as many steps as that says.
        layer_decay: Each group of layers learns at this share of the rate of the one after it; 1 for one rate.
    """

    max_steps: int = 0
    epochs: float = 300.0
    warmup_epochs: float = 0.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("max_steps", "warmup_epochs"):
            require(getattr(self, key) >= 0, f"training.{key}", getattr(self, key), "0 or more")
        require(self.epochs > 0, "training.epochs", self.epochs, "a positive number")
        require(0 < self.layer_decay <= 1, "training.layer_decay", self.layer_decay, "a number in (0, 1]")
        alone = not (self.warmup_epochs and self.warmup_steps)
        require(alone, "training.warmup_steps", self.warmup_steps, "0 beside warmup_epochs")


@dataclass
class ClassifierEvaluationConfig:
    """Evaluation: accuracy of the averaged weights on the validation images, in evaluation.csv and the trackers.

    Args:
        every: Steps between evaluations, in place of `every_epochs`; 0 for what that says.
        every_epochs: Passes over the training images between evaluations; 0 for none.
        image_size: Side in pixels of the images that are judged; if not given, as trained.
        crop_pct: Share of the image's shorter side that the centred crop keeps, as in timm's results; if not given, the
            model's.
        interpolation: How images are resampled; if not given, the model's.
        batch_size: Images per forward pass in each process.
    """

    every: int = 0
    every_epochs: float = 1.0
    image_size: int | None = None
    crop_pct: float | None = None
    interpolation: Interpolation | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        for key in ("every", "every_epochs"):
            require(getattr(self, key) >= 0, f"evaluation.{key}", getattr(self, key), "0 or more")
        check_preparation(self.image_size, self.crop_pct, "evaluation.")
        require(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "1 or more")

    @property
    def is_on(self) -> bool:
        """Whether anything is judged."""
        return self.every > 0 or self.every_epochs > 0


def check_preparation(image_size: int | None, crop_pct: float | None, group: str = "") -> None:
    """Raise :class:`InputError` for a size or a share of images to be judged, options of `group`, that cannot be."""
    require(image_size is None or image_size >= 1, f"{group}image_size", image_size, "a positive number of pixels")
    require(crop_pct is None or 0 < crop_pct <= 1, f"{group}crop_pct", crop_pct, "a share above 0, at most 1")


@dataclass
class ClassifierConfig(RunConfig):
    """Run: everything that `train-classifier` needs, written beside its checkpoints as config.yaml.

    Args:
        model: Name, sizes and first weights of the network.
        data: Labelled images to learn from and to be judged by.
        augmentation: How training images are altered.
        training: Steps, optimiser, averages, and what is written when.
        evaluation: The accuracy on the way.
    """

    model: ClassifierModelConfig = field(default_factory=ClassifierModelConfig)
    data: ClassifierDataConfig = field(default_factory=ClassifierDataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    training: ClassifierTrainingConfig = field(default_factory=ClassifierTrainingConfig)
    evaluation: ClassifierEvaluationConfig = field(default_factory=ClassifierEvaluationConfig)
