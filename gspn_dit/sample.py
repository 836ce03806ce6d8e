"""The command `python sample.py`: images from a trained model, as a grid, single files, or an npz batch.

`accelerate launch sample.py …` shares the images among its processes. They go to a folder one by one, so a run that was
cut goes on where it was when the command is given again; a grid or an npz alone is put together from a hidden folder
beside it, which then goes.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from diffusers.utils.logging import disable_progress_bar
from tqdm import tqdm

from gspn_dit.data import downsampling
from gspn_dit.devices import join_processes, memory_of
from gspn_dit.diffusion import create_scheduler, objective_of
from gspn_dit.diffusion.sampling import check_steps
from gspn_dit.drawing import (
    IGNORED,
    SETTINGS_FILE,
    begin,
    captions,
    draw_missing,
    finished_images,
    image_file,
    weights_sha256,
)
from gspn_dit.errors import InputError, check_guidance
from gspn_dit.files import LOCK_FILE, alone_in, check_begun, check_place, in_bytes, is_stream
from gspn_dit.options import require
from gspn_dit.pictures import load_image, save_grid, save_npz
from gspn_dit.pipeline import GSPNDiTPipeline, find_checkpoint, load_pipeline, unguided

BATCH_SIZE = 16
_LEAST_FILE = 4096  # bytes that an image takes on a disk: a block


@dataclass
class SampleOptions:
    """What to draw, from what, and where to.

    Args:
        model: A run, a checkpoint folder, an exported folder, `digits` or `photos`.
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
        check_guidance(
            1 if self.guidance_scale is None else self.guidance_scale,
            (0, 1) if self.guidance_interval is None else self.guidance_interval,
        )
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


def main(options: SampleOptions) -> None:
    """Draw images from a trained model. Image i depends on the seed and i alone."""
    disable_progress_bar()  # diffusers' own, while it loads
    check_outputs(options)
    processes, device = join_processes(options.device)
    # of a run in training the newest checkpoint changes: one process says which it is
    (checkpoint,) = broadcast_object_list([find_checkpoint(options.model) if processes.is_main_process else None])
    pipe = load_pipeline(checkpoint or options.model)
    if options.sampler is not None:
        pipe.scheduler = create_scheduler(objective_of(pipe.scheduler), options.sampler)
    choices = resolve(pipe, options)
    batch_size = min(options.num_images, options.batch_size or batch_of(pipe, choices))
    latent_size = pipe.latent_size(choices["height"], choices["width"])
    shape = (batch_size, pipe.transformer.config.in_channels, *latent_size)
    pipe.check_memory(shape, choices["guidance_scale"], choices["mixed_precision"], device)
    check_room(options, (choices["height"], choices["width"]))
    labels = choose_labels(pipe, options)
    missing: list[int] = []
    with ExitStack() as stack:
        if processes.is_main_process:
            if pipe.config.class_dropout in (0, 1):
                print(f"guidance_scale 1: {unguided(pipe.config.class_dropout)}", file=sys.stderr)
            for folder in output_folders(options).values():
                if folder != options.folder:
                    folder.mkdir(parents=True, exist_ok=True)
            settings = describe(pipe, options, choices) | {"model": str(checkpoint or options.model)}
            if options.single_files:
                check_begun(options.folder / SETTINGS_FILE, settings, "out", IGNORED)  # before it waits for a stranger
            else:
                stack.callback(remove_if_empty, options.folder)
            stack.enter_context(alone_in(options.folder, partial(say_who, options.folder)))
            missing = start(options, settings, labels)
        (missing,) = broadcast_object_list([missing])
        draw_missing(
            pipe.to(device),
            options.folder,
            labels,
            missing,
            processes,
            seed=options.seed,
            batch_size=batch_size,
            **choices,
        )
        if processes.is_main_process:
            assemble(options, labels, pipe)
            print(f"{len(labels)} images: {', '.join(path for path in (options.out, options.npz) if path is not None)}")
    processes.destroy_process_group()


def say_who(folder: Path, holder: str) -> None:
    """Tell the person whom this process waits for."""
    print(f"{holder} is drawing into {folder}; waiting for its end", file=sys.stderr)


def choose_labels(pipe: GSPNDiTPipeline, options: SampleOptions) -> list[int]:
    """The class id of every image; the first are the same however many there are.

    Raises :class:`InputError` for what is no class, or more of them than images to take them in turn.
    """
    if options.class_labels is None:
        classes = list(range(pipe.transformer.config.num_classes))
    elif options.class_labels in (pipe.config.class_names or []):  # one name, which may hold commas
        classes = pipe.class_ids([options.class_labels])
    else:
        classes = pipe.class_ids([label.strip() for label in options.class_labels.split(",")])
    if options.class_labels is not None and options.labels == "balanced" and len(classes) > options.num_images:
        raise InputError(
            f"num_images={options.num_images}: fewer than the {len(classes)} class_labels, so that some would have no "
            f"image; give {len(classes)} or more, fewer labels, or --labels random"
        )
    if options.labels == "balanced":
        return [classes[i % len(classes)] for i in range(options.num_images)]
    draws = np.random.Generator(np.random.Philox(key=options.seed)).random(options.num_images)
    return [classes[int(draw * len(classes))] for draw in draws]


def resolve(pipe: GSPNDiTPipeline, options: SampleOptions) -> dict[str, Any]:
    """The options of the pipeline's call, with its own defaults in their places. Raises :class:`InputError`."""
    own, factor = pipe.config, downsampling(pipe.vae)
    height, width = (factor * side for side in pipe.latent_size(options.height, options.width))
    scale, interval = pipe.guidance(options.guidance_scale, options.guidance_interval)
    choices = {
        "guidance_scale": scale,
        "guidance_interval": interval,
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
    """Begin or continue the folder of images, alone in it; a hidden one that other settings left is begun anew."""
    try:
        return begin(options.folder, settings, labels)
    except InputError:
        if options.single_files:
            raise
        clear(options.folder)
        return begin(options.folder, settings, labels)


def remove_if_empty(folder: Path) -> None:
    """Remove a hidden folder, unless it holds what a cut run goes on from, or another's lock."""
    with suppress(OSError):
        folder.rmdir()


def clear(folder: Path) -> None:
    """Remove what is in a hidden folder of images, but for its lock."""
    for path in folder.iterdir():
        if path.name != LOCK_FILE:
            path.unlink()


def assemble(options: SampleOptions, labels: list[int], pipe: GSPNDiTPipeline) -> None:
    """Put the grid or the npz together from the folder of images, and empty a folder that nobody asked for."""
    paths = [options.folder / image_file(i) for i in range(len(labels))]
    if options.npz is not None:
        bar = tqdm(paths, desc="npz", unit="image", leave=False)
        ids = np.array(labels, dtype=np.int64)
        batches = (load_image(path)[None] for path in bar)
        save_npz(batches, (len(labels), *load_image(paths[0]).shape), options.npz, arr_1=ids, labels=ids)
    if not options.single_files:
        if options.out is not None:
            images = np.stack([load_image(path) for path in paths])
            save_grid(torch.from_numpy(images).permute(0, 3, 1, 2), options.out, captions(pipe, labels))
        clear(options.folder)


def output_folders(options: SampleOptions) -> dict[str, Path]:
    """The folders that `out` and `npz` are written to, of those that are given."""
    folders = {}
    if options.out is not None and not is_stream(options.out):
        folders["out"] = options.folder if options.single_files else Path(options.out).parent
    if options.npz is not None:
        folders["npz"] = Path(options.npz).parent
    return folders


def check_outputs(options: SampleOptions) -> None:
    """Raise :class:`InputError` if the outputs cannot be written, or old images would stay among the new."""
    finished = finished_images(options.folder, below=options.num_images)
    size = (options.num_images - len(finished)) * _LEAST_FILE
    for key in output_folders(options):
        check_place(getattr(options, key), key, folder=key == "out" and options.single_files, size=size)
    if options.single_files:
        ours = set(map(image_file, finished))
        if stale := sorted(path.name for path in Path(options.out).glob("*.png") if path.name not in ours):
            raise InputError(f"out={options.out!r}: {len(stale)} PNGs of another run would stay there ({stale[0]}, …); "
                             "empty it or name another folder")  # fmt: skip


def check_room(options: SampleOptions, image_size: tuple[int, int]) -> None:
    """Raise :class:`InputError` if the npz has no room on its disk, or the grid none in memory."""
    size = options.num_images * math.prod(image_size) * 3
    if options.npz is not None:
        check_place(options.npz, "npz", size=size)
    memory = memory_of(torch.device("cpu"))
    if options.out is not None and not options.single_files and 2 * size > memory:  # the images, and the grid of them
        raise InputError(
            f"out={options.out!r}: a grid of {options.num_images} images takes over {in_bytes(2 * size)}, and the "
            f"memory is {in_bytes(memory)}; give a folder for single files, or fewer"
        )
