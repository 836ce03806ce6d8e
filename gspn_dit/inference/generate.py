"""What `gspn-dit generate` does: images of texts, of any size, as single files or as one grid.

The path of an image: :mod:`~gspn_dit.inference.text_to_image` loads a Stable Diffusion pipeline and mounts replacement
layers on it, :mod:`~gspn_dit.inference.prompts` encodes the text, and every stage of
:mod:`~gspn_dit.inference.stages` draws latents (:mod:`~gspn_dit.inference.unet_sampling`), with little memory where
they are large (:mod:`~gspn_dit.inference.unet_memory`). The last stage's are decoded and written.

Image i is a function of the model, its prompt, the stages, and (seed, i). So processes share the images, and a command
that was cut goes on where it was when it is given again, also between the stages of an image.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("generate", prog="python -m gspn_dit.inference.generate")
    raise SystemExit

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers.utils.logging import disable_progress_bar
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers.utils import logging as transformers_logging

from gspn_dit.autoencoder import downsampling
from gspn_dit.errors import InputError, not_none, renamed, warn
from gspn_dit.inference.decoding import decode_images
from gspn_dit.inference.generated_folder import (
    IGNORED,
    begin,
    forget_latents,
    keep_latents,
    kept_stages,
    load_latents,
)
from gspn_dit.inference.outputs import check_outputs, check_room, clear, prepare_folders
from gspn_dit.inference.prompts import TextToImagePipeline, encode_prompts, read_prompts, truncated
from gspn_dit.inference.safety import is_unsafe
from gspn_dit.inference.sample_folder import finished_images, image_file
from gspn_dit.inference.stages import Stage, enlarged, ladder, stage_noise
from gspn_dit.inference.text_to_image import (
    default_guidance_scale,
    default_size,
    find_replacement,
    find_text_to_image,
    load_text_to_image,
    sha256_of_parts,
)
from gspn_dit.inference.unet_memory import check_unet_memory, choose_saving, saving_memory
from gspn_dit.inference.unet_sampling import draw_latents, fresh, set_steps
from gspn_dit.processes import agreed_precision, join_processes
from gspn_dit.progress import progress
from gspn_dit.storage.files import replacing
from gspn_dit.storage.pictures import load_image, save_grid, save_image

if TYPE_CHECKING:
    from gspn_dit.commands import GenerateOptions

BATCH_SIZE = 4
logger = logging.getLogger(__name__)


def main(options: GenerateOptions) -> None:
    """Draw images of texts. Image i depends on its prompt, the seed and i alone."""
    disable_progress_bar()  # diffusers' own, while it loads
    transformers_logging.disable_progress_bar()
    texts = options.prompt + ([] if options.prompts is None else read_prompts(options.prompts))
    prompts = [text for text in texts for _ in range(options.num_images)]
    check_outputs(options, len(prompts))
    find_text_to_image(not_none(options.model))
    if options.replacement is not None:
        find_replacement(options.replacement)
    processes, device = join_processes(options.device)
    precision = agreed_precision(options.mixed_precision, device)
    pipe = load_text_to_image(not_none(options.model), options.replacement, precision.dtype)
    logging.getLogger(type(pipe).__module__).setLevel(logging.ERROR)  # it says of every batch what is said below, once
    stages = plan_stages(pipe, options)
    guidance_scale = default_guidance_scale(pipe) if options.guidance_scale is None else options.guidance_scale
    drawing = Drawing(pipe, stages, guidance_scale, options.negative_prompt, options.seed, options.memory)
    batch_size = min(len(prompts), options.batch_size or default_batch_size(pipe, stages[0]))
    drawing.check_memory(batch_size, device)
    check_room(options, len(prompts), stages[-1].size)
    missing: list[int] = []
    with ExitStack() as stack:
        if processes.is_main_process:
            negative = [] if options.negative_prompt is None else [options.negative_prompt]
            for text in truncated(pipe, texts + negative):
                warn(f"longer than the model reads, which leaves off its end: {text!r}")
            named = {"model": options.model, "replacement": options.replacement}
            settings = generation_settings(drawing, precision.name) | named
            settings |= sha256_of_parts(pipe, not_none(options.model), options.replacement)
            prepare_folders(options, settings, stack, IGNORED)
            missing = begin_folder(options, settings, prompts)
            precision.say()
        (missing,) = broadcast_object_list([missing])
        pipe.to(device)
        draw_missing(drawing, options.folder, prompts, missing, processes, batch_size)
        if processes.is_main_process:
            assemble(options, prompts)
            print(f"{len(prompts)} images: {options.out}" if len(prompts) > 1 else f"1 image: {options.out}")
    processes.destroy_process_group()


def plan_stages(pipe: TextToImagePipeline, options: GenerateOptions) -> list[Stage]:
    """The stages of every image. Raises :class:`InputError` for sizes or steps that cannot be."""
    height, width = default_size(pipe)
    first = Stage(options.height or height, options.width or width, options.num_inference_steps)
    set_steps(fresh(pipe.scheduler), first.num_inference_steps)
    stages = ladder(first, downsampling(pipe.vae), options.factors, options.strength, options.upscale_steps)
    with renamed(num_inference_steps="upscale_steps"):
        for stage in stages[1:]:
            set_steps(fresh(pipe.scheduler), stage.num_inference_steps)
    return stages


def default_batch_size(pipe: TextToImagePipeline, stage: Stage) -> int:
    """Images at a time where nobody said how many: as many pixels at any size from the trained one up."""
    return max(1, min(BATCH_SIZE, BATCH_SIZE * math.prod(default_size(pipe)) // math.prod(stage.size)))


@dataclass(frozen=True)
class Drawing:
    """What every image of a command is drawn with.

    Args:
        pipe: Stable Diffusion's.
        stages: Of every image.
        guidance_scale: Classifier-free guidance, 1 for none.
        negative_prompt: What guidance leads away from; None is no text.
        seed: Image i is a function of (seed, i).
        memory: Whether to save memory.
    """

    pipe: TextToImagePipeline
    stages: list[Stage]
    guidance_scale: float
    negative_prompt: str | None
    seed: int
    memory: Literal["auto", "on", "off"]

    def latent_size(self, number: int) -> tuple[int, int]:
        """Height and width of a stage's latents."""
        height, width = self.stages[number].size
        return height // downsampling(self.pipe.vae), width // downsampling(self.pipe.vae)

    def together(self, number: int, batch_size: int) -> int:
        """Images at a time in a stage: as many pixels as `batch_size` images have in the first."""
        first, area = (math.prod(self.stages[each].size) for each in (0, number))
        return max(1, batch_size * first // area)

    def steps(self, number: int) -> int:
        """Calls of the UNet that a stage of an image takes, if guidance counts as none."""
        stage = self.stages[number]
        return len(set_steps(fresh(self.pipe.scheduler), stage.num_inference_steps, stage.strength))

    def check_memory(self, batch_size: int, device: torch.device) -> None:
        """Raise :class:`InputError` for a stage that is more than a device could ever have memory for."""
        for number, stage in enumerate(self.stages):
            count, sliced = (
                self.together(number, batch_size),
                choose_saving(self.memory, self.latent_size(number)).slices,
            )
            images = count * (1 if sliced or self.guidance_scale <= 1 else 2)
            try:
                check_unet_memory(self.pipe.unet, (images, *self.latent_size(number)), device)
            except InputError as error:
                raise InputError(
                    f"stage {number + 1} of {stage.width}×{stage.height} pixels, {count} at a time: {error}",
                    remedy="draw fewer at a time or smaller ones" + ("" if sliced else ", or give --memory on"),
                ) from error

    def draw(
        self, number: int, images: Sequence[int], prompts: Sequence[str], before: Tensor | None, after_step: Callable
    ) -> Tensor:
        """Latents (B, C, h, w) of some images after a stage.

        Args:
            number: Of the stage, from 0.
            images: Their numbers.
            prompts: Their texts.
            before: Their latents after the stage before, (B, C, h', w'); None in the first.
            after_step: Called after each step.
        """
        stage, pipe = self.stages[number], self.pipe
        generators = [stage_noise(self.seed, i, number) for i in images]
        shape = (len(images), pipe.unet.config.in_channels, *self.latent_size(number))
        saving = choose_saving(self.memory, self.latent_size(number))
        condition, null_condition = encode_prompts(pipe, prompts, self.negative_prompt, self.guidance_scale > 1)
        begin_with = None if before is None else enlarged(pipe.vae, before, stage.size)
        with saving_memory(pipe.unet, saving):
            return draw_latents(
                pipe.unet,
                pipe.scheduler,
                randn_tensor(shape, generator=generators, device=pipe.unet.device, dtype=torch.float32),
                condition,
                null_condition,
                image_size=stage.size,
                num_inference_steps=stage.num_inference_steps,
                guidance_scale=self.guidance_scale,
                begin=begin_with,
                strength=stage.strength,
                generator=generators,
                guidance_in_slices=saving.slices,
                after_step=after_step,
            )


def generation_settings(drawing: Drawing, mixed_precision: str) -> dict[str, Any]:
    """What a command asks for beside the prompts, and how images are sampled, for JSON; who draws them is no part."""
    pipe = drawing.pipe
    scheduler = {key: value for key, value in sorted(pipe.scheduler.config.items()) if not key.startswith("_")}
    return {
        "seed": drawing.seed,
        "negative_prompt": drawing.negative_prompt,
        "guidance_scale": drawing.guidance_scale,
        "stages": [asdict(stage) for stage in drawing.stages],
        "mixed_precision": mixed_precision,
        "sampler": type(pipe.scheduler).__name__,
        "scheduler": scheduler,
    }


def begin_folder(options: GenerateOptions, settings: dict[str, Any], prompts: Sequence[str]) -> list[int]:
    """Begin or continue the folder of images, locked before; a hidden one that another command left is begun anew.

    Returns the numbers of the images that are still to be drawn.
    """
    try:
        return begin(options.folder, settings, prompts)
    except InputError:
        if options.single_files:
            raise
        clear(options.folder)
        return begin(options.folder, settings, prompts)


def draw_missing(
    drawing: Drawing,
    folder: Path,
    prompts: Sequence[str],
    missing: Sequence[int],
    processes: PartialState,
    batch_size: int,
) -> None:
    """Draw this process's share of the missing images, and wait for the others'.

    The main process shows how far all are: its own steps, and those of the images that others have finished.
    """
    batch_size = min(batch_size, math.ceil(len(missing) / processes.num_processes) or 1)
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    own_batches = batches[processes.process_index :: processes.num_processes]
    kept = kept_stages(folder)
    steps = [drawing.steps(number) for number in range(len(drawing.stages))]
    done = sum(steps) * (len(prompts) - len(missing)) + sum(sum(steps[: kept[i] + 1]) for i in missing if i in kept)
    finished, own = len(finished_images(folder, below=len(prompts))), 0
    with progress(
        total=sum(steps) * len(prompts),
        initial=done,
        desc="generating",
        unit="step",
        smoothing=0,
        disable=not processes.is_main_process,
    ) as bar:
        for batch in own_batches:
            draw_batch(drawing, folder, prompts, batch, kept, batch_size, bar)
            own += len(batch)
            others = len(finished_images(folder, below=len(prompts))) - finished - own
            bar.update(max(0, others) * sum(steps))
            own += max(0, others)
        processes.wait_for_everyone()
        bar.update(sum(steps) * len(prompts) - bar.n)


def draw_batch(
    drawing: Drawing,
    folder: Path,
    prompts: Sequence[str],
    batch: Sequence[int],
    kept: dict[int, int],
    batch_size: int,
    bar: Any,
) -> None:
    """Draw some images through all stages, from where each of them is, and write them."""
    stages, last = drawing.stages, len(drawing.stages) - 1
    latents = {i: load_latents(folder, i, kept[i]) for i in batch if i in kept}
    for number, stage in enumerate(stages):
        todo = [i for i in batch if kept.get(i, -1) < number]
        count = drawing.together(number, batch_size)
        if last:
            bar.set_postfix_str(f"stage {number + 1} of {last + 1}, {stage.width}×{stage.height}", refresh=False)
        for images in (todo[start : start + count] for start in range(0, len(todo), count)):
            before = torch.stack([latents[i] for i in images]).to(drawing.pipe.unet.device) if number else None
            texts, advance = [prompts[i] for i in images], len(images)
            drawn = drawing.draw(number, images, texts, before, lambda steps=advance: bar.update(steps))
            for i, each in zip(images, drawn.cpu(), strict=True):
                latents[i] = each
                if last:
                    keep_latents(folder, i, number, each)
    for i in batch:
        write_image(drawing.pipe, latents.pop(i), folder / image_file(i))
        forget_latents(folder, i, before=last + 1)


def write_image(pipe: TextToImagePipeline, latents: Tensor, path: Path) -> None:
    """Decode latents (C, h, w) and write the image; a black one if the pipeline's safety checker finds it unfit."""
    (image,) = decode_images(pipe.vae, latents[None].to(pipe.unet.device), "uint8")
    if is_unsafe(pipe, image):
        warn(f"{path.name} is black: the model's safety checker took it for unfit to be seen")
        image = torch.zeros_like(image)
    save_image(image, path)


def assemble(options: GenerateOptions, prompts: Sequence[str]) -> None:
    """Put the one picture together from the folder of images, and empty a folder that nobody asked for."""
    if options.single_files:
        return
    paths = [options.folder / image_file(i) for i in range(len(prompts))]
    if len(paths) == 1:
        with replacing(options.out) as temporary:
            shutil.copyfile(paths[0], temporary)
    else:
        images = np.stack([load_image(path) for path in paths])
        save_grid(torch.from_numpy(images).permute(0, 3, 1, 2), options.out, prompts)
    clear(options.folder)
