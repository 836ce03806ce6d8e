"""The command `python sample.py`: images from a trained model, as a grid, single files, or an npz batch."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor
from tqdm import tqdm

from gspn_dit.devices import choose_device
from gspn_dit.diffusion import create_scheduler, image_generator, objective_of
from gspn_dit.diffusion.sampling import check_steps
from gspn_dit.errors import InputError
from gspn_dit.files import replacing
from gspn_dit.options import require
from gspn_dit.pictures import save_grid, save_image
from gspn_dit.pipeline import GSPNDiTPipeline, load_pipeline


@dataclass
class SampleOptions:
    """What to draw, from what, and where to.

    Args:
        model: A run, a checkpoint folder, an exported folder, or `digits`.
        class_labels: Class ids or names between commas, taken in turn; all classes if not given.
        num_images: How many images.
        guidance_scale: Classifier-free guidance, 1 for none; the model's own default if not given.
        guidance_interval: Share of the noise levels at which guidance acts, 0 clean and 1 pure noise.
        num_inference_steps: Denoising steps; the model's own default if not given.
        sampler: `ddpm`, `ddim` or `dpm++` for a ddpm model; `euler` or `heun` for a flow model.
        seed: Image i is a function of (seed, i), whatever the batch size.
        batch_size: Images at a time.
        height: Pixels; the trained size if not given.
        width: Pixels; the trained size if not given.
        out: A `.png` for one grid, or a folder for single PNGs and labels.csv; `samples.png` unless there is `npz`.
        npz: A file for the images as uint8 (N, H, W, 3) `arr_0` and their `labels`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
    """

    model: str = "digits"
    class_labels: str | None = None
    num_images: int = 16
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    num_inference_steps: int | None = None
    sampler: str | None = None
    seed: int = 0
    batch_size: int = 16
    height: int | None = None
    width: int | None = None
    out: str | None = None
    npz: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for key in ("num_images", "batch_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        if self.num_inference_steps is not None:
            require(self.num_inference_steps >= 1, "num_inference_steps", self.num_inference_steps, "1 or more")
        if self.guidance_scale is not None:
            require(self.guidance_scale >= 1, "guidance_scale", self.guidance_scale, "1 (none) or more")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            require(0 <= low < high <= 1, "guidance_interval", self.guidance_interval, "0 <= low < high <= 1")
        if self.out is None and self.npz is None:
            self.out = "samples.png"
        if self.out is not None:
            require(self.single_files or Path(self.out).suffix == ".png", "out", self.out, "a .png file or a folder")
        if self.npz is not None:
            require(Path(self.npz).suffix == ".npz", "npz", self.npz, "a file name ending in .npz")

    @property
    def single_files(self) -> bool:
        """Whether `out` is a folder."""
        if not self.out:
            return False
        return self.out.endswith(("/", os.sep)) or not Path(self.out).suffix or Path(self.out).is_dir()


def main(options: SampleOptions) -> None:
    """Draw images from a trained model. Image i depends on the seed and i alone."""
    disable_progress_bar()  # diffusers' own, while it loads
    check_outputs(options)
    device = choose_device(options.device)
    pipe = load_pipeline(options.model)
    labels = choose_labels(pipe, options.class_labels)
    labels = [labels[i % len(labels)] for i in range(options.num_images)]
    pipe.latent_size(options.height, options.width)
    if options.sampler is not None:
        pipe.scheduler = create_scheduler(objective_of(pipe.scheduler), options.sampler)
    check_steps(pipe.scheduler, options.num_inference_steps or pipe.config.num_inference_steps)
    for folder in output_folders(options).values():
        folder.mkdir(parents=True, exist_ok=True)
    images = draw(pipe.to(device), labels, options)
    if options.out is not None and not options.single_files:
        save_grid(images, options.out)
    if options.npz is not None:
        with replacing(options.npz) as temporary, open(temporary, "wb") as file:
            np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy(), labels=np.array(labels))
    if options.single_files:
        with replacing(Path(options.out) / "labels.csv") as temporary, open(temporary, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file", "label"])
            table.writerows([f"{i:06d}.png", label] for i, label in enumerate(labels))
    print(f"{len(labels)} images: {', '.join(path for path in (options.out, options.npz) if path is not None)}")


def draw(pipe: GSPNDiTPipeline, labels: list[int], options: SampleOptions) -> Tensor:
    """The images, uint8 (N, 3, H, W) on the CPU; a folder's PNGs are written as they come, and none returned for it
    alone, so that memory does not grow with their number."""
    keep = options.npz is not None or not options.single_files
    images = []
    pipe.set_progress_bar_config(desc="steps", leave=False, position=1, disable=None)
    with tqdm(total=len(labels), desc="sampling", unit="image", smoothing=0) as bar:
        for start in range(0, len(labels), options.batch_size):
            batch = labels[start : start + options.batch_size]
            pictures = pipe(
                batch,
                guidance_scale=options.guidance_scale,
                guidance_interval=options.guidance_interval,
                num_inference_steps=options.num_inference_steps,
                height=options.height,
                width=options.width,
                generator=[image_generator(options.seed, start + j) for j in range(len(batch))],
                output_type="uint8",
            ).images.cpu()
            if options.single_files:
                for j, picture in enumerate(pictures):
                    save_image(picture, Path(options.out) / f"{start + j:06d}.png")
            if keep:
                images.append(pictures)
            bar.update(len(batch))
    return torch.cat(images) if keep else torch.empty(0)


def choose_labels(pipe: GSPNDiTPipeline, class_labels: str | None) -> list[int]:
    """Class ids of the option's ids and names; all of the model's if it is None."""
    if class_labels is None:
        return list(range(pipe.transformer.config.num_classes))
    if class_labels in (pipe.config.class_names or []):  # one name, which may hold commas
        return pipe.class_ids([class_labels])
    return pipe.class_ids([label.strip() for label in class_labels.split(",")])


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
        new = {f"{i:06d}.png" for i in range(options.num_images)}
        if stale := sorted(path.name for path in Path(options.out).glob("*.png") if path.name not in new):
            raise InputError(f"out={options.out!r}: {len(stale)} PNGs of another run would stay there ({stale[0]}, …); "
                             "empty it or name another folder")  # fmt: skip
