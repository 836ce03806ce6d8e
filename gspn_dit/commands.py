"""Every command of `gspn-dit`: its options, and where its work is done.

The work is named, not imported: torch and diffusers take seconds, which a wrong option or `--help` shall not cost. The
options of `gspn-dit train` are :mod:`gspn_dit.config`'s.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gspn_dit.config import Config, MixedPrecision
from gspn_dit.demo.packaged import PACKAGED
from gspn_dit.errors import check_guidance
from gspn_dit.options import command, require
from gspn_dit.storage.files import is_stream


@dataclass
class SampleOptions:
    """What to draw, from what, and where to.

    Args:
        model: A run, a checkpoint folder, an exported folder, `digits` or `photos`.
        vae: A folder or hub name of a VAE in place of the model's own: one that lies elsewhere now, or whose decoder
            was trained further.
        class_labels: Class ids or names between commas (names alone where classes are called by numbers); all classes
            if not given.
        labels: `balanced` takes these classes in turn, `random` draws each image's by the seed.
        num_images: How many images.
        guidance_scale: Classifier-free guidance, 1 for none; the model's own default if not given.
        guidance_interval: Share of the noise levels at which guidance acts, 0 clean and 1 pure noise.
        num_inference_steps: Denoising steps; the model's own default if not given.
        sampler: `ddpm`, `ddim` or `dpm++` for a ddpm model; `euler` or `heun` for a flow model.
        shift: Of a flow model's noise levels at another size than trained: a number above 1 keeps more of the steps
            noisy, `auto` takes √(pixels / trained pixels).
        chunk_scale: How many times as long as in training the chunks of local scans are; `auto` takes the side over
            the trained side.
        mixed_precision: What the transformer computes in: `auto` takes bf16 where the device has instructions for it
            and float32 elsewhere; `no` is float32; or `bf16`, or `fp16`.
        seed: Image i is a function of (seed, i), whatever the batch size and the number of processes.
        batch_size: Images at a time, in each process; if not given, 16 or the fewer that have the pixels of 16 images
            of the trained size.
        height: Pixels; the trained size if not given.
        width: Pixels; the trained size if not given.
        out: A `.png` for one grid, or a folder for single PNGs and labels.csv; `samples.png` unless there is `npz`.
        npz: A file for the images as ADM has them, uint8 (N, H, W, 3) `arr_0` and labels `arr_1`; without a name, the
            name of the folder `out` and `.npz`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
    """

    model: str = "digits"
    vae: str | None = None
    class_labels: str | None = None
    labels: Literal["balanced", "random"] = "balanced"
    num_images: int = 16
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    num_inference_steps: int | None = None
    sampler: str | None = None
    shift: float | Literal["auto"] | None = None
    chunk_scale: float | Literal["auto"] | None = None
    mixed_precision: MixedPrecision = "auto"
    seed: int = 0
    batch_size: int | None = None
    height: int | None = None
    width: int | None = None
    out: str | None = None
    npz: bool | str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        require(self.num_images >= 1, "num_images", self.num_images, "1 or more")
        if self.batch_size is not None:
            require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        if self.num_inference_steps is not None:
            require(self.num_inference_steps >= 1, "num_inference_steps", self.num_inference_steps, "1 or more")
        check_guidance(
            1 if self.guidance_scale is None else self.guidance_scale,
            (0, 1) if self.guidance_interval is None else self.guidance_interval,
        )
        if self.class_labels and re.fullmatch(r"\[.*\]", self.class_labels):  # as any list may be written
            self.class_labels = self.class_labels[1:-1]
        self.npz = self.npz or None
        if self.out is None and self.npz is None:
            self.out = "samples.png"
        if self.out is not None:
            fits = self.single_files or is_stream(self.out) or Path(self.out).suffix == ".png"
            require(fits, "out", self.out, f"a .png file or a folder, which a slash at its end makes it: {self.out}/")
        if self.npz is True:
            require(self.single_files, "npz", True, "a file name, or --out with a folder that gives it its name")
            self.npz = f"{Path(self.out)}.npz"
        if self.npz is not None:
            require(Path(self.npz).suffix == ".npz", "npz", self.npz, "a file name ending in .npz")

    @property
    def single_files(self) -> bool:
        """Whether `out` is a folder."""
        if not self.out or is_stream(self.out):
            return False
        return self.out.endswith(("/", os.sep)) or not Path(self.out).suffix or Path(self.out).is_dir()

    @property
    def folder(self) -> Path:
        """Where the single images go: `out`, or a hidden folder beside the one file that is made of them."""
        if self.single_files:
            path = Path(self.out)
            return Path(os.path.realpath(path)) if path.is_symlink() else path
        path = Path(self.out or self.npz)
        if is_stream(path):  # there is no writing beside it
            return Path(tempfile.gettempdir()) / f".{path.name}.{os.getuid()}.images"
        return path.with_name(f".{path.name}.images")


@dataclass
class EvaluateOptions:
    """Evaluation of generated images.

    Args:
        samples: Folder of images (labels.csv beside them: file,label), or an npz of uint8 NHWC arr_0 (and labels).
        reference: What to compare with: a folder, an npz of images, an ADM reference npz (mu, sigma, mu_s, sigma_s and
            arr_0; `python fid/reference.py` makes one, of any features), or `digits`, `photos`, `digits:test`,
            `photos:test`.
        features: `inception`, or `digits` or `photos` for the packaged classifier of those.
        out: The JSON file to write.
        weights: Weights file of the features; null takes the packaged ones, or torch-fidelity's download.
        device: `auto` takes the accelerator if there is one, and each process of `accelerate launch` its own.
    """

    samples: str
    reference: str
    features: Literal["inception", "digits", "photos"]
    out: str
    weights: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        require(not Path(self.out).is_dir(), "out", self.out, "the name of a file to write, this is a folder")
        require(self.weights is None or Path(self.weights).is_file(), "weights", self.weights, "a file: no such file")


@dataclass
class ReferenceOptions:
    """A reference file in ADM's format.

    Args:
        data: `digits`, `photos`, `digits:test`, `photos:test`, a folder of images, or a latent store.
        out: The npz file to write.
        image_size: Side in pixels that a folder of `class/*.jpg` is cropped to as ADM does; null takes a folder's
            images as they are.
        exif_orientation: Turn those of such a folder as their EXIF orientation says, as for a training that did.
        num_images: How many images go into the file, for precision and recall, drawn at random; null takes ADM's
            10000, or all if there are fewer. The statistics are of all images.
        seed: Of the draw.
        vae: What decodes a latent store; null takes the VAE that made it.
        features: `inception`, or `digits` or `photos` for the packaged classifier of those.
        weights: Weights file of the features; null takes the packaged ones, or torch-fidelity's download.
        device: `auto` takes the accelerator if there is one, and each process of `accelerate launch` its own.
    """

    data: str
    out: str
    image_size: int | None = None
    exif_orientation: bool = False
    num_images: int | None = None
    seed: int = 0
    vae: str | None = None
    features: Literal["inception", "digits", "photos"] = "inception"
    weights: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
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
class EncodeOptions:
    """What to encode, or what to verify.

    Args:
        data: `digits`, `photos`, or a folder of `class/*.jpg`.
        vae: `digits`, `photos`, a hub name or a local folder of a diffusers AutoencoderKL.
        image_size: Side of the square images in pixels.
        out: The store's folder; a run that was interrupted continues there.
        split: Of digits and photos; a folder is one split.
        horizontal_flip: Encode every image's mirror image too, for training with horizontal flips.
        exif_orientation: Turn images as their EXIF orientation says; ADM, and so every published figure, does not.
        batch_size: Images the VAE encodes at once.
        shard_size: Images a shard file.
        num_workers: Processes that read images; 0 reads in this one.
        mixed_precision: What the VAE computes in. `no` is float32, for the store's float16 rounds latents by 3e-4 (root
            mean square, packaged VAEs), and bf16 moves them by 1e-2 to 2e-2, fp16 by 2e-3; or `auto`, `bf16`, `fp16`.
        device: `auto` takes the accelerator if there is one.
        verify: Instead of encoding, compare this finished store's shards with their checksums.
    """

    data: str | None = None
    vae: str | None = None
    image_size: int | None = None
    out: str | None = None
    split: Literal["train", "test"] = "train"
    horizontal_flip: bool = False
    exif_orientation: bool = False
    batch_size: int = 32
    shard_size: int = 4096
    num_workers: int = 4
    mixed_precision: MixedPrecision = "no"
    device: str = "auto"
    verify: str | None = None

    def __post_init__(self) -> None:
        if self.verify is None:
            for key in ("data", "vae", "image_size", "out"):
                require(getattr(self, key) is not None, key, None, "a value, which encoding needs")
        for key in ("batch_size", "shard_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")


@dataclass
class ExportOptions:
    """What to export, and where to.

    Args:
        model: A run, or one checkpoint of it.
        out: The folder to write; it must not exist yet.
        vae: A folder or hub name of a VAE in place of the run's own: one that lies elsewhere now, or whose decoder was
            trained further.
    """

    model: str
    out: str
    vae: str | None = None


@dataclass
class SmallVAEOptions:
    """How a small VAE is trained; what is null comes from the recipe of its data, a folder's is that of the photos.

    Args:
        data: What it is for: `digits`, `photos`, or a folder of images, at any depth.
        out: Folder to write, in diffusers' layout; it must not exist yet.
        image_size: Side in pixels of the images that the diffusion model is to learn, of a folder's.
        steps: Optimiser steps.
        batch_size: Images a step.
        learning_rate: Peak of AdamW's rate, which falls to 0 along a cosine.
        warmup_steps: Steps over which the rate rises first.
        mixed_precision: `auto` trains in bf16 where this CPU has instructions for it and in float32 elsewhere; or `no`
            (float32), or `bf16`.
        kl_weight: Weight of the posterior's KL divergence per latent value, against the error per pixel.
        latent_noise: Standard deviation of the noise, in units of the latents', that the decoder learns to see through.
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
        if self.data in PACKAGED:
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
class ClassifierOptions:
    """Training of a classifier.

    Args:
        data: What it is of: `digits` or `photos`.
        out: The safetensors file to write.
        seed: Seed of the weights, the order and the augmentation.
        epochs: Passes over the training images; null takes 36 for the digits and 4 for the photos.
    """

    data: Literal["digits", "photos"]
    out: str
    seed: int = 0
    epochs: int | None = None

    def __post_init__(self) -> None:
        require(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(not Path(self.out).is_dir(), "out", self.out, "the name of a file to write, this is a folder")


@dataclass
class PosthocEMAOptions:
    """Which average to make.

    Args:
        run: The run, trained with `training.posthoc_ema_every` above 0.
        sigma_rel: The average's width relative to its step: 0.05 is a sharp one, 0.2 a wide one.
        out: The folder to write, which sample.py and export take as a model; it must not exist yet.
        step: Up to which step; the newest snapshot's if not given.
    """

    run: str
    sigma_rel: float
    out: str
    step: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.sigma_rel <= 0.28, "sigma_rel", self.sigma_rel, "a number above 0, at most 0.28")


@dataclass
class ModelsOptions:
    """What to list.

    Args:
        names: Models to count, for example `[dit-xl-2,gspn-dit-xl-2]`; null is all of them.
    """

    names: list[str] | None = None


@dataclass
class OpsOptions:
    """Which backends to look for.

    Args:
        require: Look for this one alone, say native-cuda, and end with an error if it is missing.
    """

    require: str | None = None


@dataclass
class BudgetOptions:
    """What to reckon with.

    Args:
        names: Models.
        image_size: Pixels, 8 times the latents' side.
        batch_size: Images a step over all GPUs.
        gpus: Numbers of GPUs.
        memory_gb: A GPU's memory, in 10^9 bytes.
        peak_tflops: A GPU's dense bfloat16 peak; 989 is an H100 SXM's, 312 an A100's.
        utilisation: Share of the peak that training is assumed to reach.
        node_gpus: GPUs that a machine has.
        node_gb_s: What a GPU sends to others of its machine, in 10^9 bytes a second; 450 is NVLink 4's.
        network_gb_s: What a GPU sends to other machines; 50 is a 400 Gb/s adapter for each GPU.
        steps: Steps of the whole training.
    """

    names: list[str] = field(
        default_factory=lambda: ["dit-xl-2", "gspn-xl-2", "gspn-dit-xl-2", "gspn-dit-l-2", "gspn-dit-b-2"]
    )
    image_size: int = 256
    batch_size: int = 256
    gpus: list[int] = field(default_factory=lambda: [1, 8, 64])
    memory_gb: float = 80.0
    peak_tflops: float = 989.0
    utilisation: float = 0.4
    node_gpus: int = 8
    node_gb_s: float = 450.0
    network_gb_s: float = 50.0
    steps: int = 400_000

    def __post_init__(self) -> None:
        require(self.image_size >= 16 and self.image_size % 16 == 0, "image_size", self.image_size, "a multiple of 16")
        for number in self.gpus:
            require(number >= 1 and self.batch_size % number == 0, "gpus", number, f"a divisor of {self.batch_size}")
        for key in ("batch_size", "memory_gb", "peak_tflops", "node_gpus", "node_gb_s", "network_gb_s", "steps"):
            require(getattr(self, key) > 0, key, getattr(self, key), "more than 0")
        require(0 < self.utilisation <= 1, "utilisation", self.utilisation, "a share up to 1")


@dataclass(frozen=True)
class Verb:
    """A command: the function that does its work as `module:function`, what it takes, and what it does, in a line."""

    main: str
    options: type
    help: str
    positional: tuple[str, ...] = ()
    continues: bool = False  # the same command, given again, goes on where it was


VERBS = {
    "encode": Verb(
        "gspn_dit.data.encode:main",
        EncodeOptions,
        "Encode images into a store of latents, or verify one.",
        continues=True,
    ),
    "train": Verb("gspn_dit.training.loop:main", Config, "Train a class-conditional latent diffusion transformer."),
    "sample": Verb(
        "gspn_dit.inference.sample:main", SampleOptions, "Draw images from a trained model.", continues=True
    ),
    "reference": Verb(
        "gspn_dit.evaluation.reference:main",
        ReferenceOptions,
        "Make a reference file: statistics of the features of all images of a source, and some of the images.",
    ),
    "evaluate": Verb(
        "gspn_dit.evaluation.evaluate:main",
        EvaluateOptions,
        "Score images as ADM's suite does: FID, sFID, Inception Score, precision, recall; or class accuracy.",
    ),
    "export": Verb(
        "gspn_dit.inference.export:main",
        ExportOptions,
        "Write a run's newest checkpoint as a saved pipeline.",
        ("model", "out"),
    ),
    "posthoc-ema": Verb(
        "gspn_dit.training.posthoc_ema:main",
        PosthocEMAOptions,
        "Make averaged weights of any width from a run's snapshots, as a checkpoint folder to sample from.",
    ),
    "small-vae": Verb("gspn_dit.demo.small_vae:main", SmallVAEOptions, "Train a small VAE."),
    "classifier": Verb(
        "gspn_dit.demo.classifier:main", ClassifierOptions, "Train the classifier that samples are recognised by."
    ),
    "models": Verb(
        "gspn_dit.models.__main__:main", ModelsOptions, "List models: parameters, and GMACs at 256 and 512 pixels."
    ),
    "ops": Verb(
        "gspn_dit.ops.__main__:main", OpsOptions, "Say which kernels of the operator run on this machine, or why not."
    ),
    "budget": Verb(
        "gspn_dit.training.budget:main",
        BudgetOptions,
        "Compute what a training needs: memory of a GPU, steps a second to expect, hours.",
    ),
}


def run(name: str, *, prog: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run a command by its name; `prog` is what it was called as."""
    verb = VERBS[name]
    command(
        verb.main,
        verb.options,
        prog=prog or f"gspn-dit {name}",
        argv=argv,
        description=verb.help,
        positional=verb.positional,
        continues=verb.continues,
    )
