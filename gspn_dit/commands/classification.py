"""Options of the commands that use a trained classifier; those of its training are in `gspn_dit.classifier_config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gspn_dit.arguments import MixedPrecision, default_workers
from gspn_dit.classifier_config import Interpolation, check_preparation
from gspn_dit.data.sources import SOURCES
from gspn_dit.options import require
from gspn_dit.storage.packaged import PACKAGED_IMAGE_CLASSIFIERS, absolute


@dataclass
class ClassifyOptions:
    """Pictures, and the classifier that is asked.

    Args:
        pictures: Picture files.
        model: A run, a checkpoint, the folder of a saved classifier, or a packaged one: `fashion`.
        image_size: Side in pixels at which pictures are shown to it; if not given, as trained.
        top: How many classes are named for each picture.
        device: `auto` is the accelerator if there is one.
    """

    pictures: list[str]
    model: str = "fashion"
    image_size: int | None = None
    top: int = 3
    device: str = "auto"

    def __post_init__(self) -> None:
        require(bool(self.pictures), "pictures", self.pictures, "picture files")
        check_preparation(self.image_size, None)
        require(self.top >= 1, "top", self.top, "1 or more")
        self.model = absolute(self.model, PACKAGED_IMAGE_CLASSIFIERS)


@dataclass
class EvaluateClassifierOptions:
    """A classifier, and the labelled images that it is judged by.

    Args:
        model: A run, a checkpoint, the folder of a saved classifier, or a packaged one: `fashion`.
        data: A folder of `class/*.jpg`; a folder with `train/` and `val/`, a folder of idx files or a named source, of
            which the validation images are taken.
        image_size: Side in pixels of the images; if not given, as trained.
        crop_pct: Share of the image's shorter side that the centred crop keeps, as in timm's results; if not given, the
            model's.
        interpolation: How images are resampled; if not given, the model's.
        batch_size: Images per forward pass in each process.
        num_workers: Processes that read images, per process; 0 reads in the process itself. If not given, one for each
            core, up to 4.
        mixed_precision: `auto` is bf16 where the device has instructions for it and float32 elsewhere; `no` is float32;
            or `bf16`, or `fp16`.
        out: A JSON file to write; if not given, the scores are printed alone.
        device: `auto` is the accelerator if there is one; each process of `accelerate launch` has its own.
    """

    model: str
    data: str
    image_size: int | None = None
    crop_pct: float | None = None
    interpolation: Interpolation | None = None
    batch_size: int = 256
    num_workers: int = field(default_factory=default_workers)
    mixed_precision: MixedPrecision = "auto"
    out: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        check_preparation(self.image_size, self.crop_pct)
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")
        if self.out is not None:
            require(not Path(self.out).is_dir(), "out", self.out, "the name of a file to write, this is a folder")
        self.model = absolute(self.model, PACKAGED_IMAGE_CLASSIFIERS)
        self.data = absolute(self.data, SOURCES)
