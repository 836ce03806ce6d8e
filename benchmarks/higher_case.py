"""The images of one row of benchmarks/higher.py, in a process of its own: a model, a size, its switches.

`python -m benchmarks.higher_case '{"model": "digits", "pixels": 128, …}'`, the fields of :class:`Case`, draws the
images that the case's folder lacks, and notes in its calls.json the seconds of every call and the memory of one.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL

from benchmarks.memory import peak_bytes
from benchmarks.random_model import fill_zeros
from gspn_dit.commands import SampleOptions
from gspn_dit.diffusion import create_scheduler, image_generator
from gspn_dit.inference.loading import load_pipeline
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.inference.sample import choose_labels, default_batch_size, resolve_defaults, sampling_settings
from gspn_dit.inference.sample_folder import begin, image_file
from gspn_dit.models import create_model
from gspn_dit.precision import choose_precision
from gspn_dit.progress import progress
from gspn_dit.storage.files import write_json
from gspn_dit.storage.pictures import save_image

RANDOM = {"random-gspn-dit": "gspn-dit-ti-2", "random-dit": "dit-ti-2"}
CALLS_FILE = "calls.json"
OUT_OF_MEMORY = 3  # exit status


@dataclass(frozen=True)
class Case:
    """What is drawn.

    Args:
        model: As sample.py's, or one of :data:`RANDOM`.
        pixels: Side of the images.
        shift, chunk_scale: "auto", or None for none.
        num_images, seed: Images 0 … num_images - 1 of the seed, the classes in turn.
        guidance_scale, num_inference_steps: The model's own if None.
        folder: Where they go.
        device, threads: cpu or cuda; threads of the CPU.
    """

    model: str
    pixels: int
    shift: Literal["auto"] | None
    chunk_scale: Literal["auto"] | None
    num_images: int
    seed: int
    guidance_scale: float | None
    num_inference_steps: int | None
    folder: str
    device: str = "cpu"
    threads: int = 1


def draw(case: Case) -> None:
    """Draw what the folder lacks."""
    torch.set_num_threads(case.threads)
    pipe = open_pipeline(case.model)
    options = SampleOptions(
        model=case.model,
        num_images=case.num_images,
        seed=case.seed,
        height=case.pixels,
        width=case.pixels,
        shift=case.shift,
        chunk_scale=case.chunk_scale,
        guidance_scale=case.guidance_scale,
        num_inference_steps=case.num_inference_steps,
        out=f"{case.folder}/",
    )
    precision = choose_precision("no", torch.device(case.device))
    choices, labels = resolve_defaults(pipe, options, precision), choose_labels(pipe, options)
    folder = Path(case.folder)
    missing = begin(folder, sampling_settings(pipe, options, choices), labels)
    record = folder / CALLS_FILE
    costs: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {"calls": []}
    pipe = pipe.to(case.device)
    pipe.set_progress_bar_config(desc="steps", leave=False, position=1, disable=None)
    size = default_batch_size(pipe, choices)

    def images_of(batch: list[int], **more: Any) -> list[torch.Tensor]:
        generators = [image_generator(case.seed, i) for i in batch]
        arguments = {"generator": generators, "output_type": "uint8", **choices, **more}
        return list(pipe([labels[i] for i in batch], **arguments).images.cpu())

    pipe([0], num_inference_steps=2, output_type="uint8")  # loads kernels, so that no call that counts does
    if "peak" not in costs:
        batch = list(range(min(size, len(labels))))
        added = peak_bytes(case.device, lambda: images_of(batch, num_inference_steps=2))
        costs["peak"] = {"images": len(batch), "bytes": added}
        write_json(record, costs)
    with progress(total=len(labels), initial=len(labels) - len(missing), desc=folder.name, unit="image") as bar:
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            begun = time.perf_counter()
            images = images_of(batch)
            costs["calls"].append({"images": len(batch), "seconds": time.perf_counter() - begun})
            write_json(record, costs)
            for i, image in zip(batch, images, strict=True):
                save_image(image, folder / image_file(i))
            bar.update(len(batch))


def open_pipeline(model: str) -> GSPNDiTPipeline:
    """A pipeline as sample.py's, or one at random weights: width 192, depth 8, patch 2, a VAE of factor 4, 128 px."""
    if model not in RANDOM:
        return load_pipeline(model)
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        **blocks,
    )
    transformer = create_model(RANDOM[model], depth=8, sample_size=32, out_channels=4, num_classes=10)
    fill_zeros(transformer)
    pipe = GSPNDiTPipeline(transformer, vae, create_scheduler("flow"))
    for module in (transformer, vae):
        module.eval().requires_grad_(False)
    return pipe


if __name__ == "__main__":
    try:
        draw(Case(**json.loads(sys.argv[1])))
    except torch.OutOfMemoryError:
        raise SystemExit(OUT_OF_MEMORY) from None
