"""The command `python sample.py`: images from a trained model, as a grid, single files, or an npz batch.

`accelerate launch sample.py …` shares the images among its processes. They go to a folder one by one, so a run that was
cut goes on where it was when the command is given again; a grid or an npz alone is put together from a hidden folder
beside it, which then goes.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from diffusers.utils.logging import disable_progress_bar
from tqdm import tqdm

from gspn_dit.data import downsampling
from gspn_dit.data.vae import weights_sha256
from gspn_dit.devices import join_processes
from gspn_dit.diffusion import create_scheduler, objective_of
from gspn_dit.diffusion.sampling import check_steps
from gspn_dit.drawing import begin, draw_missing, image_file
from gspn_dit.errors import InputError
from gspn_dit.options import require
from gspn_dit.pictures import load_image, save_grid, save_npz
from gspn_dit.pipeline import GSPNDiTPipeline, find_checkpoint, load_pipeline

BATCH_SIZE = 16


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
        mixed_precision: What the transformer computes in: `bf16` or `fp16`, far faster on a GPU, or `no` for float32.
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
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
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
        if self.guidance_scale is not None:
            require(self.guidance_scale >= 1, "guidance_scale", self.guidance_scale, "1 (none) or more")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            require(0 <= low < high <= 1, "guidance_interval", self.guidance_interval, "0 <= low < high <= 1")
        self.npz = self.npz or None
        if self.out is None and self.npz is None:
            self.out = "samples.png"
        if self.out is not None:
            require(self.single_files or Path(self.out).suffix == ".png", "out", self.out, "a .png file or a folder")
        if self.npz is True:
            require(self.single_files, "npz", True, "a file name, or --out with a folder that gives it its name")
            self.npz = f"{Path(self.out)}.npz"
        if self.npz is not None:
            require(Path(self.npz).suffix == ".npz", "npz", self.npz, "a file name ending in .npz")

    @property
    def single_files(self) -> bool:
        """Whether `out` is a folder."""
        if not self.out:
            return False
        return self.out.endswith(("/", os.sep)) or not Path(self.out).suffix or Path(self.out).is_dir()

    @property
    def folder(self) -> Path:
        """Where the single images go: `out`, or a hidden folder beside the one file that is made of them."""
        if self.single_files:
            return Path(self.out)
        path = Path(self.out or self.npz)
        return path.with_name(f".{path.name}.images")


def main(options: SampleOptions) -> None:
    """Draw images from a trained model. Image i depends on the seed and i alone."""
    disable_progress_bar()  # diffusers' own, while it loads
    check_outputs(options)
    processes, device = join_processes(options.device)
    # of a run in training the newest checkpoint changes: one process says which it is
    (checkpoint,) = broadcast_object_list([find_checkpoint(options.model) if processes.is_main_process else None])
    pipe = load_pipeline(checkpoint or options.model, options.vae)
    labels = choose_labels(pipe, options)
    if options.sampler is not None:
        pipe.scheduler = create_scheduler(objective_of(pipe.scheduler), options.sampler)
    choices = resolve(pipe, options)
    missing: list[int] = []
    if processes.is_main_process:
        for folder in output_folders(options).values():
            folder.mkdir(parents=True, exist_ok=True)
        settings = describe(pipe, options, choices) | {"model": str(checkpoint or options.model)}
        missing = start(options, settings, labels)
    (missing,) = broadcast_object_list([missing])
    draw_missing(
        pipe.to(device),
        options.folder,
        labels,
        missing,
        processes,
        seed=options.seed,
        batch_size=options.batch_size or batch_of(pipe, choices),
        **choices,
    )
    if processes.is_main_process:
        assemble(options, labels, (choices["height"], choices["width"]))
        print(f"{len(labels)} images: {', '.join(path for path in (options.out, options.npz) if path is not None)}")
    processes.destroy_process_group()


def choose_labels(pipe: GSPNDiTPipeline, options: SampleOptions) -> list[int]:
    """The class id of every image; the first are the same however many there are."""
    if options.class_labels is None:
        classes = list(range(pipe.transformer.config.num_classes))
    elif options.class_labels in (pipe.config.class_names or []):  # one name, which may hold commas
        classes = pipe.class_ids([options.class_labels])
    else:
        classes = pipe.class_ids([label.strip() for label in options.class_labels.split(",")])
    if options.labels == "balanced":
        return [classes[i % len(classes)] for i in range(options.num_images)]
    draws = np.random.Generator(np.random.Philox(key=options.seed)).random(options.num_images)
    return [classes[int(draw * len(classes))] for draw in draws]


def resolve(pipe: GSPNDiTPipeline, options: SampleOptions) -> dict[str, Any]:
    """The options of the pipeline's call, with its own defaults in their places. Raises :class:`InputError`."""
    own, factor = pipe.config, downsampling(pipe.vae)
    height, width = (factor * side for side in pipe.latent_size(options.height, options.width))
    choices = {
        "guidance_scale": own.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        "guidance_interval": options.guidance_interval or own.guidance_interval,
        "num_inference_steps": options.num_inference_steps or own.num_inference_steps,
        "height": height,
        "width": width,
        "mixed_precision": None if options.mixed_precision == "no" else options.mixed_precision,
    }
    check_steps(pipe.scheduler, choices["num_inference_steps"])
    shift, chunk_scale = pipe.size_switches(height, width, options.shift, options.chunk_scale)
    return choices | {"shift": shift, "chunk_scale": chunk_scale}


def batch_of(pipe: GSPNDiTPipeline, choices: dict[str, Any]) -> int:
    """Images at a time where nobody said how many: as many pixels at any size from the trained one up."""
    return max(1, min(BATCH_SIZE, int(BATCH_SIZE / pipe.side_ratio(choices["height"], choices["width"]) ** 2)))


def describe(pipe: GSPNDiTPipeline, options: SampleOptions, choices: dict[str, Any]) -> dict[str, Any]:
    """Everything that the images are a function of, for JSON; how many there are and who draws them is no part."""
    scheduler = {key: value for key, value in sorted(pipe.scheduler.config.items()) if not key.startswith("_")}
    return {
        "model_weights": weights_sha256(pipe.transformer, pipe.vae),
        "seed": options.seed,
        "class_labels": options.class_labels,
        "labels": options.labels,
        **choices,
        "sampler": type(pipe.scheduler).__name__,
        "scheduler": scheduler,
    }


def start(options: SampleOptions, settings: dict[str, Any], labels: list[int]) -> list[int]:
    """Begin or continue the folder of images; a hidden one that other settings left is begun anew."""
    try:
        return begin(options.folder, settings, labels)
    except InputError:
        if options.single_files:
            raise
        shutil.rmtree(options.folder)
        return begin(options.folder, settings, labels)


def assemble(options: SampleOptions, labels: list[int], image_size: tuple[int, int]) -> None:
    """Put the grid or the npz together from the folder of images, and remove a folder that nobody asked for."""
    paths = [options.folder / image_file(i) for i in range(len(labels))]
    if options.npz is not None:
        bar = tqdm(paths, desc="npz", unit="image", leave=False)
        ids = np.array(labels, dtype=np.int64)
        batches = (load_image(path)[None] for path in bar)
        save_npz(batches, (len(labels), *image_size, 3), options.npz, arr_1=ids, labels=ids)
    if not options.single_files:
        if options.out is not None:
            images = np.stack([load_image(path) for path in paths])
            save_grid(torch.from_numpy(images).permute(0, 3, 1, 2), options.out)
        shutil.rmtree(options.folder)


def output_folders(options: SampleOptions) -> dict[str, Path]:
    """The folders that `out` and `npz` are written to, of those that are given."""
    folders = {}
    if options.out is not None:
        folders["out"] = Path(options.out) if options.single_files else Path(options.out).parent
    if options.npz is not None:
        folders["npz"] = Path(options.npz).parent
    return folders


def check_outputs(options: SampleOptions) -> None:
    """Raise :class:`InputError` if the outputs cannot be written, or old images would stay among the new."""
    for key, folder in output_folders(options).items():
        path = getattr(options, key)
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"{key}={path!r}: {str(there)!r} is no folder that can be written to; choose another path")
        if Path(path).is_dir() and folder != Path(path):
            raise InputError(f"{key}={path!r}: is a folder; wanted a file name")
    if options.single_files:
        new = {image_file(i) for i in range(options.num_images)}
        if stale := sorted(path.name for path in Path(options.out).glob("*.png") if path.name not in new):
            raise InputError(f"out={options.out!r}: {len(stale)} PNGs of another run would stay there ({stale[0]}, …); "
                             "empty it or name another folder")  # fmt: skip
