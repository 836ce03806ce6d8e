"""Options of the commands that score images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gspn_dit.evaluation.classifiers import check_features
from gspn_dit.options import require


@dataclass
class ReferenceOptions:
    """Reference: the images, and the file in ADM's format that is made of them.

    Args:
        data: A named source and its split (`digits`, `digits:test`, `photos`, `photos:test`), a folder of images, or a
            latent store.
        out: The npz file to write.
        image_size: Side in pixels that the images of a folder of `class/*.jpg` are cropped to, as ADM does; if not
            given, images of any folder are taken as they are.
        exif_orientation: Turn the images of such a folder as their EXIF orientation says, as for a training that did.
        num_images: How many images go into the file, for precision and recall, drawn at random; if not given, ADM's
            10000, or all if there are fewer. The statistics are of all images.
        seed: Seed of that draw.
        vae: The VAE that decodes a latent store; if not given, the one that made it.
        features: `inception`, or the name of a classifier: `digits`, `photos`.
        weights: Weights file of the features; if not given, the packaged one, or torch-fidelity's download.
        device: `auto` is the accelerator if there is one; each process of `accelerate launch` has its own.
    """

    data: str
    out: str
    image_size: int | None = None
    exif_orientation: bool = False
    num_images: int | None = None
    seed: int = 0
    vae: str | None = None
    features: str = "inception"
    weights: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        check_features("features", self.features)
        require(Path(self.out).suffix == ".npz", "out", self.out, "a file name ending in .npz")
        require(not Path(self.out).is_dir(), "out", self.out, "the name of a file to write, this is a folder")
        require(self.weights is None or Path(self.weights).is_file(), "weights", self.weights, "a file: no such file")
        for key in ("image_size", "num_images"):
            if getattr(self, key) is not None:
                require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        cropped = self.image_size is not None or not self.exif_orientation
        require(cropped, "exif_orientation", self.exif_orientation, "image_size with it: other images are as they are")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass
class EvaluateOptions:
    """Evaluation: generated images, and what they are compared with.

    Args:
        samples: Folder of images (labels.csv beside them: file,label), or an npz of uint8 NHWC arr_0 (and labels).
        reference: What to compare with: a folder, an npz of images, an ADM reference npz (mu, sigma, mu_s, sigma_s and
            arr_0; `gspn-dit reference` makes one, of any features), or a named source and its split: `digits`,
            `digits:test`, `photos`, `photos:test`.
        features: `inception`, or the name of a classifier: `digits`, `photos`.
        out: The JSON file to write.
        weights: Weights file of the features; if not given, the packaged one, or torch-fidelity's download.
        device: `auto` is the accelerator if there is one; each process of `accelerate launch` has its own.
    """

    samples: str
    reference: str
    features: str
    out: str
    weights: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        check_features("features", self.features)
        require(not Path(self.out).is_dir(), "out", self.out, "the name of a file to write, this is a folder")
        require(self.weights is None or Path(self.weights).is_file(), "weights", self.weights, "a file: no such file")
