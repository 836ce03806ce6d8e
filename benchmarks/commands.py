"""Every benchmark: its options, and where its work is done.

The work is named, not imported: torch and diffusers take seconds, which a wrong option or `--help` shall not cost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gspn_dit.arguments import CompileMode
from gspn_dit.options import command, require

DATA = ("digits", "photos", "reach-32", "reach-64")  # of benchmarks.quality
CLASSIFICATION_MIXERS = ("gspn", "attention", "linear", "window", "conv")
DISTILLATION_MIXERS = ("teacher", "gspn", "fresh", "linear", "window")
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "width": 128,
        "depth": 6,
        "steps": 600,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "ema_decay": 0.99,
        "held_out": 128,
        "samples": 256,
        "num_workers": 0,
    },
    "gpu": {
        "width": 384,
        "depth": 12,
        "steps": 5000,
        "batch_size": 64,
        "learning_rate": 5e-4,
        "ema_decay": 0.999,
        "held_out": 500,
        "samples": 2000,
        "num_workers": 8,
    },
}
RESOLUTION_PIXELS = {
    "cpu": [128, 256, 512, 1024, 2048],
    "cuda": [256, 512, 1024, 2048, 4096, 8192, 16384],
}
TEXT_TO_IMAGE_NETWORKS = ("SD 1.5", "SD-XL", "SD-XL layer")
TEXT_TO_IMAGE_MIXERS = ("gspn", "sdpa", "sdpa-cudnn", "linear", "fresh", "window")
TEXT_TO_IMAGE_SIZES = {
    "cpu": ["1024x1024", "2048x2048", "4096x4096"],
    "cuda": ["2048x2048", "4096x4096", "8192x8192", "8192x16384", "1024x1024", "512x512"],
}


@dataclass
class BlockBudgetOptions:
    """What to profile.

    Args:
        device: cpu or cuda.
        name: A model of the families gspn-dit and dit; by default gspn-dit-s-2 on the CPU, gspn-dit-xl-2 on a GPU.
        step: forward, weights and map in `dtype`; or training: forward and backward, under autocast.
        pixels: Side of the images.
        batch: Images; by default 4 on the CPU, 64 on a GPU.
        dtype: float32 or bfloat16; by default the latter where the device has instructions for it.
        compile_mode: How the compiled block is compiled, as in `training.compile_mode`.
        threads: Threads of the CPU.
        out: Also write the tables to this Markdown file.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    name: str | None = None
    step: Literal["forward", "training"] = "forward"
    pixels: int = 256
    batch: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    compile_mode: CompileMode = "default"
    threads: int = 2
    out: str | None = None

    def __post_init__(self) -> None:
        self.dtype = self.dtype or fast_dtype(self.device)
        self.name = self.name or ("gspn-dit-s-2" if self.device == "cpu" else "gspn-dit-xl-2")
        self.batch = (4 if self.device == "cpu" else 64) if self.batch is None else self.batch
        for key in ("pixels", "batch", "threads"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")


@dataclass
class LaunchesOptions:
    """What to count.

    Args:
        device: cpu or cuda.
        precision: As `training.mixed_precision`.
        threads: Threads of the CPU.
        out: Also write the table to this Markdown file.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["no", "bf16"] = "bf16"
    threads: int = 2
    out: str | None = None

    def __post_init__(self) -> None:
        require(self.threads >= 1, "threads", self.threads, "1 or more")


@dataclass
class UNetMemoryOptions:
    """What to count.

    Args:
        unets: `SD 1.5`, `SD-XL`.
        sizes: Heights and widths of images, as 16384x8192.
        out: Also write the tables to this Markdown file.
    """

    unets: list[str] = field(default_factory=lambda: ["SD 1.5", "SD-XL"])
    sizes: list[str] = field(
        default_factory=lambda: ["1024x1024", "4096x4096", "8192x8192", "8192x16384", "16384x16384"]
    )
    out: str | None = None

    def __post_init__(self) -> None:
        require(set(self.unets) <= {"SD 1.5", "SD-XL"}, "unets", self.unets, "SD 1.5, SD-XL")
        pixels_of(self.sizes)

    @property
    def pixels(self) -> list[tuple[int, int]]:
        """Heights and widths."""
        return pixels_of(self.sizes)


def pixels_of(sizes: list[str]) -> list[tuple[int, int]]:
    """Heights and widths. Raises :class:`InputError` for other words than such as 1024x2048."""
    right = all(re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", size) for size in sizes)
    require(right, "sizes", sizes, "heights and widths, as 1024x2048")
    sides = (size.split("x") for size in sizes)
    return [(int(height), int(width)) for height, width in sides]


@dataclass
class TextToImageOptions:
    """What to measure, and where the results go.

    Args:
        networks: `SD 1.5` and `SD-XL`, one call of the UNet; `SD-XL layer`, one self-attention of it, with 640
            channels. By default the UNets on a GPU, and the layer on the CPU.
        mixers: What is in the place of self-attention: sdpa, which is softmax attention by flash's kernel on a GPU,
            sdpa-cudnn, the same by cuDNN's, and replacements. If not given, all that the device has.
        sizes: Heights and widths of images, as 8192x16384, in the order of measuring; what has a target comes first.
        end_to_end: In place of single calls, generate an image of each size by SD-XL with line scans, from a text to a
            file.
        num_inference_steps: Of such an image.
        memory: What saves memory, as `memory` of `gspn-dit generate`.
        device: cpu or cuda.
        dtype: float32 or bfloat16; by default the latter where the device has instructions for it.
        threads: Threads of the CPU.
        repeats: Most timed calls of each mixer at each size, after the first.
        time_budget: Seconds after which no call begins.
        out: Where the results go, without the .json and .md.
    """

    networks: list[str] | None = None
    mixers: list[str] | None = None
    sizes: list[str] | None = None
    end_to_end: bool = False
    num_inference_steps: int = 2
    memory: Literal["auto", "on", "off"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None
    threads: int = 2
    repeats: int = 5
    time_budget: float = 3600.0
    out: str = "runs/text-to-image"

    def __post_init__(self) -> None:
        on_gpu = self.device == "cuda"
        if self.networks is None:
            self.networks = ["SD-XL", "SD 1.5"] if on_gpu else ["SD-XL layer"]
        for name in self.networks:
            require(name in TEXT_TO_IMAGE_NETWORKS, "networks", name, f"one of {', '.join(TEXT_TO_IMAGE_NETWORKS)}")
        if self.mixers is None:
            self.mixers = [each for each in TEXT_TO_IMAGE_MIXERS if on_gpu or each != "sdpa-cudnn"]
        for name in self.mixers:
            require(name in TEXT_TO_IMAGE_MIXERS, "mixers", name, f"one of {', '.join(TEXT_TO_IMAGE_MIXERS)}")
        if self.sizes is None and self.end_to_end:
            self.sizes = ["8192x16384"]
        elif self.sizes is None:
            self.sizes = TEXT_TO_IMAGE_SIZES[self.device]
        for height, width in self.pixels:
            require(height % 64 == width % 64 == 0, "sizes", f"{height}x{width}", "multiples of 64")
        self.dtype = self.dtype or fast_dtype(self.device)
        for key in ("num_inference_steps", "threads", "repeats", "time_budget"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")

    @property
    def pixels(self) -> list[tuple[int, int]]:
        """Heights and widths."""
        return pixels_of(self.sizes)


@dataclass
class DepthwiseOptions:
    """What to time.

    Args:
        device: cpu or cuda.
        kernel_size: Side of the filter.
        dtype: float32 or bfloat16; by default the latter where the device has instructions for it.
        threads: Threads of the CPU.
        out: Also write the table to this Markdown file.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    kernel_size: int = 3
    dtype: Literal["float32", "bfloat16"] | None = None
    threads: int = 2
    out: str | None = None

    def __post_init__(self) -> None:
        self.dtype = self.dtype or fast_dtype(self.device)
        require(self.threads >= 1, "threads", self.threads, "1 or more")


@dataclass
class HigherOptions:
    """What to draw, and where the results go.

    Args:
        models: Runs, checkpoints, exported folders or packaged names, each perhaps with a label, LABEL=RUN;
            random-gspn-dit and random-dit are models at random weights, for time and memory.
        pixels: Sides of the images.
        features: Which features the Fréchet distances are of, and so which real images they are to; null for none.
        num_images: Images of every row.
        guidance_scale: Classifier-free guidance; the models' own if not given.
        num_inference_steps: Denoising steps; the models' own if not given.
        shift: Whether rows with the noise shift are drawn.
        chunk_scale: Whether rows with scaled chunks are drawn.
        seed: Of the images and of where crops are taken.
        device: cpu or cuda.
        threads: Threads of the CPU.
        images: Folder for the images.
        time_budget: Seconds after which no row is begun and the one under way is given up.
        out: Where the results go, without the .json, .md, .png and -images.png.
    """

    models: list[str] = field(default_factory=lambda: ["digits"])
    pixels: list[int] = field(default_factory=lambda: [128, 256, 512, 1024])
    features: str | None = None
    num_images: int = 200
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    shift: bool = True
    chunk_scale: bool = True
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    images: str = "runs/higher"
    time_budget: float = 3600.0
    out: str = "benchmarks/results/higher"

    def __post_init__(self) -> None:
        for key in ("num_images", "threads", "time_budget"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.features is None or self.num_images >= 2, "num_images", self.num_images, "2 or more for distances")
        require(len(self.sources) == len(self.models), "models", self.models, "labels that differ")

    @property
    def sources(self) -> dict[str, str]:
        """Every model's path by its label."""
        pairs = (model.rpartition("=")[::2] for model in self.models)
        return {label or Path(source).name: source for label, source in pairs}


@dataclass
class GuidanceOptions:
    """What to draw, and where the results go.

    Args:
        data: `digits`, `photos`: the packaged models and what they were trained on.
        guides: For autoguidance, a worse model of some data, DATA=RUN: a run, a checkpoint or an exported folder.
        num_images: Images of every row.
        num_inference_steps: Denoising steps.
        guidance_scale: Of all rows but those without guidance.
        seed: Of the images.
        threads: Threads of the CPU.
        images: Folder for the images.
        time_budget: Seconds after which no row is begun.
        out: Where the results go, without the .json and .md.
    """

    data: list[str] = field(default_factory=lambda: ["digits", "photos"])
    guides: list[str] = field(default_factory=list)
    num_images: int = 200
    num_inference_steps: int = 12
    guidance_scale: float = 2.0
    seed: int = 0
    threads: int = 2
    images: str = "runs/guidance"
    time_budget: float = 3600.0
    out: str = "benchmarks/results/guidance"

    def __post_init__(self) -> None:
        for name in self.data:
            require(name in ("digits", "photos"), "data", name, "digits or photos")
        pairs = all(data in self.data and guide for data, guide in self.guide_of.items())
        require(pairs, "guides", self.guides, "DATA=RUN, of data that is drawn")
        for key in ("num_inference_steps", "threads", "time_budget"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.num_images >= 2, "num_images", self.num_images, "2 or more")
        require(self.guidance_scale > 1, "guidance_scale", self.guidance_scale, "more than 1")

    @property
    def guide_of(self) -> dict[str, str]:
        """The guide of every data that has one."""
        pairs = (guide.partition("=")[::2] for guide in self.guides)
        return dict(pairs)


@dataclass
class KernelProfileOptions:
    """What to profile, on a GPU.

    Args:
        what: `operator`, `models` or `counters`; `calls` is what Nsight Compute runs for the counters.
        cases: Calls of the operator by their names in its table.
        models: Whole models, at 256 pixels and batch 64.
        time_budget: Seconds after which Nsight Compute is given no other case and the one under way is given up.
        out: The folder of results.
    """

    what: Literal["operator", "models", "counters", "calls"] = "operator"
    cases: list[str] = field(
        default_factory=lambda: [
            "256 px, global",
            "512 px, global",
            "1024 px, global",
            "16K px, chunk 32",
            "2048 px, global",
            "GSPN-2: 1024², 8 ch, global",
        ]
    )
    models: list[str] = field(default_factory=lambda: ["gspn-dit-xl-2", "dit-xl-2"])
    time_budget: float | None = None
    out: str = "runs/profile"


@dataclass
class OperatorOptions:
    """How to time the operator.

    Args:
        repeats: Timed calls of each case, after one that is not timed; by default 7 on the CPU and 50 on a GPU.
        out: Also write the tables to this Markdown file; on a GPU, to this folder.
        device: cpu or cuda.
    """

    repeats: int | None = None
    out: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass
class QualityOptions:
    """What to train, and how.

    Args:
        out: The folder of results; run again with the same one to go on.
        preset: Sizes for a CPU (width 128) or a GPU (the S size); the options that are null take theirs from it.
        data: Data sets: `digits`, `photos`, `reach-32`, `reach-64`.
        models: Families, each with options after a plus, if any.
        seeds: How many seeds, 0, 1, …
        time_budget: Seconds after which to stop; the step or the evaluation that is under way is still finished.
        width: Channels of a token, in every model.
        depth: Blocks, in every model; the family `gspn`, which needs an odd number, takes one more than an even one.
        steps: Optimiser steps.
        batch_size: Images a step.
        learning_rate: Peak of AdamW's learning rate, after a warm-up over 5% of the steps; then a cosine down to 0.
        ema_decay: Decay of the averaged weights, which are what is evaluated.
        mixed_precision: `auto` is bf16 where the device has instructions for it and `no`, float32, elsewhere.
        held_out: Held-out images, each at ten times, of the held-out loss.
        samples: Images drawn for the other figures.
        inference_steps: Euler steps of a sample, without guidance.
        num_workers: Processes that read data.
        compile: Run the models through torch.compile.
        device: `auto`, or a torch device.
    """

    out: str = "runs/quality"
    preset: Literal["cpu", "gpu"] = "cpu"
    data: list[str] = field(default_factory=lambda: list(DATA))
    models: list[str] = field(
        default_factory=lambda: [
            "dit",
            "gspn",
            "gspn-dit",
            "gspn-dit+mixer=attention",
            "gspn-dit+mixer=linear",
            "gspn-dit+mixer=conv",
        ]
    )
    seeds: int = 3
    time_budget: float | None = None
    width: int | None = None
    depth: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    ema_decay: float | None = None
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    held_out: int | None = None
    samples: int | None = None
    inference_steps: int = 50
    num_workers: int | None = None
    compile: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for key, value in PRESETS[self.preset].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        for key in ("seeds", "steps", "batch_size", "held_out", "inference_steps"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.samples >= 2, "samples", self.samples, "2 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "a number in [0, 1)")
        for name in self.data:
            require(name in DATA, "data", name, f"data sets out of {', '.join(DATA)}")


@dataclass
class QualityCurvesOptions:
    """What to train, for how long, and where it goes on next time.

    Args:
        out: The folder of results.
        state: The folder of checkpoints, from which the next run goes on; `state` in the folder of results if not
            given.
        seconds: Time of this run, of which every model has its share.
        data: `photos` or another data set of `benchmarks.quality`, or a folder with Fashion-MNIST's files.
        models: Families, each with options after a plus, if any.
        seed: Of the weights and the training stream.
        preset: Sizes for a CPU (width 128) or a GPU (the S size); the options that are null take theirs from it.
        width: Channels of a token, in every model.
        depth: Blocks, in every model.
        steps: Steps at which a model is left, however much time there is; null for none.
        look_every: Steps between looks at the held-out loss.
        held_out: Held-out images of it, each at ten times.
        batch_size: Images a step.
        learning_rate: AdamW's, after a warm-up over 200 steps.
        num_workers: Processes that read data.
        mixed_precision: `auto` is bf16 where the device has instructions for it and `no`, float32, elsewhere.
        compile: Run the models through torch.compile.
        device: `auto`, or a torch device.
    """

    out: str = "runs/curves"
    state: str | None = None
    seconds: float = 180.0
    data: str = "photos"
    models: list[str] = field(default_factory=lambda: ["dit", "gspn-dit", "gspn-dit+mixer=conv"])
    seed: int = 0
    preset: Literal["cpu", "gpu"] = "gpu"
    width: int | None = None
    depth: int | None = None
    steps: int | None = None
    look_every: int = 100
    held_out: int = 128
    batch_size: int | None = None
    learning_rate: float | None = None
    num_workers: int | None = None
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    compile: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        self.state = self.state or f"{self.out}/state"
        for key in ("width", "depth", "batch_size", "learning_rate", "num_workers"):
            if getattr(self, key) is None:
                setattr(self, key, PRESETS[self.preset][key])
        for key in ("seconds", "look_every", "held_out", "batch_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")
        known = self.data in DATA or Path(self.data).is_dir()
        require(known, "data", self.data, f"one of {', '.join(DATA)}, or a folder with Fashion-MNIST's files")


@dataclass
class ClassificationOptions:
    """What to train, and how.

    Args:
        data: A folder of idx files with pictures of 28 pixels, as MNIST and Fashion-MNIST are shipped.
        out: The folder of results; run again with the same one to go on. Several processes may share it.
        mixers: How tokens exchange information: `gspn` and baselines.
        seeds: How many seeds, 0, 1, …
        steps: Optimiser steps.
        batch_size: Images a step.
        learning_rate: Peak of AdamW's learning rate, after a warm-up over 5% of the steps; then a cosine down to 0.
        sizes: Smallest and largest side in pixels that a step's images are resized to; null leaves them at 28.
        speed: Measure in turns how many images a second are trained on, in place of training.
    """

    data: str
    out: str = "runs/classification"
    mixers: list[str] = field(default_factory=lambda: list(CLASSIFICATION_MIXERS))
    seeds: int = 3
    steps: int = 2500
    batch_size: int = 32
    learning_rate: float = 3e-3
    sizes: tuple[int, int] | None = (20, 40)
    speed: bool = False

    def __post_init__(self) -> None:
        for key in ("seeds", "steps", "batch_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")
        ordered = self.sizes is None or 0 < self.sizes[0] <= self.sizes[1]
        require(ordered, "sizes", self.sizes, "two numbers of pixels, 0 < low <= high")
        for name in self.mixers:
            require(name in CLASSIFICATION_MIXERS, "mixers", name, f"one of {', '.join(CLASSIFICATION_MIXERS)}")


@dataclass
class DistillationOptions:
    """What is taught to take the place of attention, and how.

    Args:
        teacher: The folder of a Stable Diffusion pipeline that draws scenes.
        data: A store of scenes' latents and embeddings that `gspn-dit encode-t2i` made with it.
        out: The folder of results; run again with the same one to go on. Several processes may share it.
        mixers: What takes attention's place: `gspn`, line scans from its Q, K and V, and baselines; `teacher` is judged
            as it is.
        seeds: How many seeds, 0, 1, …
        layerwise_steps: Optimiser steps of the first stage, every layer alone; 0 leaves it out.
        steps: Optimiser steps of the second stage, the whole UNet.
        batch_size: Latents a step.
        learning_rate: Peak of AdamW's learning rate, after a warm-up over 5% of a stage; then a cosine down to 0.
        chunk: Side of scans' and attention's windows, in latents.
        num_inference_steps: Of the pictures.
        guidance_scale: Of the pictures.
        images: Pictures at the trained size; fewer of larger ones.
    """

    teacher: str
    data: str
    out: str = "runs/distillation"
    mixers: list[str] = field(default_factory=lambda: list(DISTILLATION_MIXERS))
    seeds: int = 3
    layerwise_steps: int = 400
    steps: int = 800
    batch_size: int = 16
    learning_rate: float = 1e-3
    chunk: int = 8
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    images: int = 300

    def __post_init__(self) -> None:
        for key in ("seeds", "steps", "batch_size", "chunk", "num_inference_steps"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.layerwise_steps >= 0, "layerwise_steps", self.layerwise_steps, "0 or more")
        require(self.images >= 2, "images", self.images, "2 or more, for their covariance")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")
        for name in self.mixers:
            require(name in DISTILLATION_MIXERS, "mixers", name, f"one of {', '.join(DISTILLATION_MIXERS)}")


@dataclass
class ResolutionOptions:
    """What to measure, and where the results go.

    Args:
        device: cpu or cuda.
        size: Size of the models: s, b, l or xl; by default s on the CPU and xl on a GPU.
        pixels: Sides of the images, multiples of 64, in the order of measuring; what has a target comes first.
        dtypes: float32, bfloat16 or both, out of which every model gets its faster one; by default both on a CPU that
            multiplies in bfloat16, float32 on another, bfloat16 on a GPU.
        max_autotune: Also try every model with blocks compiled in the mode max-autotune.
        threads: Threads of the CPU.
        repeats: Most timed calls of each measurement; at least 3, and none after 3 seconds.
        time_budget: Seconds after which no measurement is begun and the one under way is given up.
        out: Where the results go, without the .json, .md and .png; the default tells CPUs without AVX-512 apart.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    size: Literal["s", "b", "l", "xl"] | None = None
    pixels: list[int] | None = None
    dtypes: list[Literal["float32", "bfloat16"]] | None = None
    max_autotune: bool = False
    threads: int = 2
    repeats: int = 15
    time_budget: float = 3600.0
    out: str | None = None

    def __post_init__(self) -> None:
        self.size = self.size or ("s" if self.device == "cpu" else "xl")
        self.pixels = self.pixels or RESOLUTION_PIXELS[self.device]
        self.dtypes = self.dtypes or fast_dtypes(self.device)
        if self.out is None:
            from benchmarks.machine import results_name

            self.out = f"benchmarks/results/resolution-{results_name(self.device)}"
        for pixels in self.pixels:
            require(pixels >= 64 and pixels % 64 == 0, "pixels", pixels, "multiples of 64")
        for key in ("threads", "repeats", "time_budget"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")


@dataclass
class StoreOptions:
    """How large the stores are.

    Args:
        images: Images of the store that is opened, of 4×4 latents.
        compared_images: Images read from both kinds of storage, of 32×32 latents (ImageNet's at 256 px).
        repeats: Timed passes of each kind, after its one pass over a cold cache.
        workers: Reading processes.
        folder: Where the data is made for the time being; the system's temporary folder if not given.
        out: Also write the tables to this Markdown file.
    """

    images: int = 1_280_000
    compared_images: int = 40_000
    repeats: int = 5
    workers: int = 4
    folder: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        for key in ("images", "compared_images", "repeats", "workers"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")


@dataclass
class ThroughputOptions:
    """What to measure, and where the tables go.

    Args:
        names: Classifiers of this package or of timm.
        image_sizes: Sides of the square images in pixels.
        batch_size: Images per call.
        device: cpu or cuda.
        dtype: float32 or bfloat16, by autocast; if not given, bfloat16 where the device has instructions for it.
        channels_last: Keep images and weights with channels last in memory.
        compile: Run the models through torch.compile.
        threads: Threads of the CPU.
        repeats: Timed calls of each pass of each model.
        seconds: No call begins after so many, but the first of each that counts.
        out: Also write the tables to this Markdown file, and the figures to the same name in .json.
    """

    names: list[str] = field(
        default_factory=lambda: [
            "gspn-t",
            "gspn-grouped-t",
            "swin_tiny_patch4_window7_224",
            "convnext_tiny",
            "mambaout_tiny",
        ]
    )
    image_sizes: list[int] = field(default_factory=lambda: [224])
    batch_size: int = 64
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None
    channels_last: bool = False
    compile: bool = False
    threads: int = 2
    repeats: int = 10
    seconds: float = 600.0
    out: str | None = None

    def __post_init__(self) -> None:
        for key in ("batch_size", "threads", "repeats", "seconds"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for side in self.image_sizes:
            require(side >= 32, "image_sizes", side, "32 pixels or more")


@dataclass
class TargetsOptions:
    """Whose figures to compare.

    Args:
        results: The folder that benchmarks/gpu.sh was given.
        out: Also write the table to this Markdown file.
    """

    results: str
    out: str | None = None


def fast_dtype(device: str) -> str:
    """bfloat16 where the device has instructions for it, else float32."""
    import torch

    from gspn_dit.precision import choose_precision

    return str(choose_precision("auto", torch.device(device)).dtype).removeprefix("torch.")


def fast_dtypes(device: str) -> list[str]:
    """The dtypes worth trying on this machine."""
    if device == "cuda":
        return ["bfloat16"]
    return ["bfloat16", "float32"] if fast_dtype(device) == "bfloat16" else ["float32"]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that is run by its name.

    Args:
        options: The dataclass that its `main` takes.
        asks: The question that it answers, for a person.
    """

    options: type
    asks: str


BENCHMARKS = {
    "operator": Benchmark(
        OperatorOptions, "How fast is `propagate` beside its reference, attention and memory's floor?"
    ),
    "block_budget": Benchmark(BlockBudgetOptions, "Where does the time of one block go?"),
    "launches": Benchmark(LaunchesOptions, "What does a step of a small model launch, and how many does a graph save?"),
    "kernel_profile": Benchmark(
        KernelProfileOptions, "Which kernels take a GPU's time, and what limits those of the operator?"
    ),
    "unet_memory": Benchmark(
        UNetMemoryOptions, "How much memory does a call of Stable Diffusion's UNets take by size?"
    ),
    "text_to_image": Benchmark(
        TextToImageOptions, "How fast are Stable Diffusion's UNets with line scans, beside attention and the bound?"
    ),
    "depthwise": Benchmark(DepthwiseOptions, "Which way to a block's depthwise convolution is fastest?"),
    "resolution": Benchmark(ResolutionOptions, "How do time and memory of whole models grow with the image?"),
    "classifier_throughput": Benchmark(
        ThroughputOptions, "How many images a second does a classifier take, beside timm's?"
    ),
    "higher": Benchmark(HigherOptions, "How good are images larger than the models were trained for, at what cost?"),
    "guidance": Benchmark(GuidanceOptions, "What does each way of guidance do to images of the packaged models?"),
    "quality": Benchmark(QualityOptions, "Which network learns most in the same number of steps?"),
    "classification": Benchmark(ClassificationOptions, "Which mixer tells clothes apart best in the same few minutes?"),
    "distillation": Benchmark(
        DistillationOptions, "What can take the place of a text-to-image model's attention, and at what loss?"
    ),
    "targets": Benchmark(TargetsOptions, "What is reached of what a GPU's figures are to be?"),
    "quality_curves": Benchmark(QualityCurvesOptions, "Which network learns most in the same minutes?"),
    "store": Benchmark(StoreOptions, "What does the latent store cost and gain at ImageNet's size?"),
}


def run(name: str) -> None:
    """Run a benchmark by its name, with this process's command line."""
    benchmark, module = BENCHMARKS[name], f"benchmarks.{name}"
    command(f"{module}:main", benchmark.options, prog=f"python -m {module}", description=benchmark.asks)
