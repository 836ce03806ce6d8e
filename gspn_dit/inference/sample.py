"""What `gspn-dit sample` does: images from a trained model, as single files, as one grid, or as an npz batch.

The path of an image: :mod:`~gspn_dit.inference.loading` finds the model and makes the pipeline,
:mod:`~gspn_dit.inference.sample_folder` shares the images among the processes of `accelerate launch` and calls the
pipeline, :mod:`~gspn_dit.inference.pipeline` denoises latents and decodes them, and :mod:`gspn_dit.storage.pictures`
writes the files.

A grid or an npz is always put together from PNGs that were written first, to a hidden folder beside it if nobody asked
for single files. So a command that was cut goes on with the images it has when it is given again.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("sample", prog="python -m gspn_dit.inference.sample")
    raise SystemExit

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from diffusers import SchedulerMixin
from diffusers.utils.logging import disable_progress_bar

from gspn_dit.autoencoder import downsampling
from gspn_dit.autoencoder.vae import weights_sha256
from gspn_dit.diffusion import create_scheduler, objective_of
from gspn_dit.diffusion.integrator import Integrator
from gspn_dit.diffusion.sampling import check_guidance_of, check_steps
from gspn_dit.diffusion.schedulers import shifted, with_options
from gspn_dit.errors import InputError, not_none, renamed
from gspn_dit.inference.graphed_model import graph_choice
from gspn_dit.inference.grid import captions
from gspn_dit.inference.loading import find_checkpoint, load_pipeline
from gspn_dit.inference.memory import check_memory
from gspn_dit.inference.outputs import check_outputs, check_room, clear, prepare_folders
from gspn_dit.inference.pipeline import GSPNDiTPipeline, unguided
from gspn_dit.inference.sample_folder import (
    ABSENT,
    IGNORED,
    begin,
    draw_missing,
    image_file,
)
from gspn_dit.precision import Precision
from gspn_dit.processes import agreed_precision, join_processes
from gspn_dit.progress import progress
from gspn_dit.storage.pictures import load_image, save_grid, save_npz

if TYPE_CHECKING:
    from gspn_dit.commands import SampleOptions

T = TypeVar("T")

BATCH_SIZE = 16
logger = logging.getLogger(__name__)


def main(options: SampleOptions) -> None:
    """Draw images from a trained model. Image i depends on the seed and i alone."""
    disable_progress_bar()  # diffusers' own, while it loads
    check_outputs(options, options.num_images)
    processes, device = join_processes(options.device)
    # of a run in training the newest checkpoint changes: one process says which it is
    found = [find_models(options) if processes.is_main_process else None]
    (model, guide) = not_none(broadcast_object_list(found)[0])
    pipe = load_pipeline(model, options.vae)
    if guide is not None:
        with renamed(model="guide"):
            pipe.guide_by(load_pipeline(guide, options.vae))
    if options.sampler is not None or options.scheduler_options:
        pipe.scheduler = other_scheduler(pipe, options)
    precision = agreed_precision(options.mixed_precision, device)
    call = resolve_defaults(pipe, options, precision)
    batch_size = min(options.num_images, options.batch_size or default_batch_size(pipe, call))
    shape = (batch_size, pipe.transformer.config.in_channels, *pipe.latent_size(call["height"], call["width"]))
    forwards = pipe.forwards_together(pipe.guidance(**options.guidance))
    check_memory(pipe, shape, forwards, call["mixed_precision"], device)
    together = batch_size * forwards
    graph = graph_choice(pipe.transformer, options.cuda_graph, device, (together, *shape[1:]))
    check_room(options, options.num_images, (call["height"], call["width"]))
    subjects = choose_subjects(pipe, options)
    missing: list[int] = []
    with ExitStack() as stack:
        if processes.is_main_process:
            if pipe.config.class_dropout in (0, 1) and pipe.guide is None:
                logger.info(f"guidance_scale 1: {unguided(pipe.config.class_dropout)}", extra={"stderr": True})
            settings = sampling_settings(pipe, options, call) | {"model": str(model)}
            prepare_folders(options, settings, stack, IGNORED, ABSENT)
            missing = begin_folder(options, settings, subjects, pipe.config.class_names)
            precision.say()
            if device.type == "cuda":
                graph.say()
        (missing,) = broadcast_object_list([missing])
        draw_missing(
            pipe.to(device),
            options.folder,
            subjects,
            missing,
            processes,
            seed=options.seed,
            batch_size=batch_size,
            cuda_graph=options.cuda_graph,
            **call,
        )
        if processes.is_main_process:
            assemble(options, subjects, pipe)
            written = [path for path in (options.out, options.npz_file) if path is not None]
            print(f"{len(subjects)} images: {', '.join(written)}")
    processes.destroy_process_group()


def find_models(options: SampleOptions) -> tuple[Path | str, Path | str | None]:
    """The model and the guide, of runs their newest checkpoints now. Raises :class:`InputError`."""
    checkpoint = find_checkpoint(options.model)
    model = options.model if checkpoint is None else checkpoint.path
    if options.guide is None:
        return model, None
    with renamed(model="guide"):
        earlier = find_checkpoint(options.guide)
    return model, options.guide if earlier is None else earlier.path


def other_scheduler(pipe: GSPNDiTPipeline, options: SampleOptions) -> SchedulerMixin:
    """The sampler that is asked for, of the model's process; its options alone change the model's own sampler."""
    own = pipe.scheduler
    if options.sampler is None:
        return with_options(own, options.scheduler_options)
    return create_scheduler(objective_of(own), options.sampler, options.scheduler_options, like=own)


def resolve_defaults(pipe: GSPNDiTPipeline, options: SampleOptions, precision: Precision) -> dict[str, Any]:
    """The arguments of the pipeline's call: the options, and the model's own defaults where an option is not given.

    Raises :class:`InputError` for what cannot be.
    """
    own, factor = pipe.config, downsampling(pipe.vae)
    height, width = (factor * side for side in pipe.latent_size(options.height, options.width))
    guidance = pipe.guidance(**options.guidance)
    if options.guide is not None and guidance.guidance_scale == 1:
        raise InputError(
            "at guidance_scale 1 nothing is led away from it",
            argument="guide",
            value=options.guide,
            remedy="give a larger guidance_scale",
        )
    if options.guidance_power is not None and guidance.guidance_schedule != "power-cosine":
        raise InputError(
            f"the guidance schedule {guidance.guidance_schedule} has no power",
            argument="guidance_power",
            value=options.guidance_power,
            remedy="leave it out, or give guidance_schedule power-cosine",
        )
    chooses = isinstance(pipe.scheduler, Integrator) and pipe.scheduler.chooses_times
    call = {
        **vars(guidance),
        "num_inference_steps": 1 if chooses else options.num_inference_steps or own.num_inference_steps,
        "height": height,
        "width": width,
        "mixed_precision": precision.name,
    }
    shift, chunk_scale = pipe.size_switches(height, width, options.shift, options.chunk_scale)
    check_steps(pipe.scheduler if shift is None else shifted(pipe.scheduler, shift), call["num_inference_steps"])
    check_guidance_of(pipe.scheduler, guidance)
    return call | {"shift": shift, "chunk_scale": chunk_scale}


def default_batch_size(pipe: GSPNDiTPipeline, call: dict[str, Any]) -> int:
    """Images at a time where nobody said how many: as many pixels at any size from the trained one up."""
    return max(1, min(BATCH_SIZE, int(BATCH_SIZE / pipe.side_ratio(call["height"], call["width"]) ** 2)))


def choose_subjects(pipe: GSPNDiTPipeline, options: SampleOptions) -> list[int] | list[str]:
    """The class id or the prompt of every image. Raises :class:`InputError` for those of the other kind of model."""
    if pipe.subject == "class_labels":
        if options.prompts is not None:
            raise InputError(
                "this model draws classes", argument="prompts", value=options.prompts, remedy="give class_labels"
            )
        return choose_labels(pipe, options)
    if options.class_labels is not None:
        raise InputError(
            "this model draws from text", argument="class_labels", value=options.class_labels, remedy="give prompts"
        )
    prompts = options.prompt_list or list(pipe.config.prompts or [])
    if not prompts:
        raise InputError("nothing says what to draw", argument="prompts", wanted="a prompt, or a .txt file of them")
    return in_turn(prompts, options, "prompts" if options.prompts is not None else None)


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
    return in_turn(classes, options, "class_labels" if options.class_labels is not None else None)


def in_turn(choices: list[T], options: SampleOptions, given: str | None) -> list[T]:
    """One of the choices for each image, in turn or at random.

    Raises :class:`InputError` if there are more than images, and the option called `given` says them all.
    """
    if given is not None and options.labels == "balanced" and len(choices) > options.num_images:
        raise InputError(
            f"fewer than the {len(choices)} {given}, so that some would have no image",
            argument="num_images",
            value=options.num_images,
            remedy=f"give {len(choices)} or more, fewer {given.removeprefix('class_')}, or --labels random",
        )
    if options.labels == "balanced":
        return [choices[i % len(choices)] for i in range(options.num_images)]
    draws = np.random.Generator(np.random.Philox(key=options.seed)).random(options.num_images)
    return [choices[int(draw * len(choices))] for draw in draws]


def sampling_settings(pipe: GSPNDiTPipeline, options: SampleOptions, call: dict[str, Any]) -> dict[str, Any]:
    """Everything that the images are a function of, for JSON; how many there are and who draws them is no part."""
    scheduler = {key: value for key, value in sorted(pipe.scheduler.config.items()) if not key.startswith("_")}
    networks = [pipe.transformer, pipe.vae] + ([] if pipe.text_encoder is None else [pipe.text_encoder])
    if pipe.subject == "prompt":
        asked: dict[str, Any] = {"prompts": options.prompt_list or list(pipe.config.prompts)}
    else:
        asked = {"class_labels": options.class_labels}
    return {
        "model_weights": weights_sha256(*networks),
        "guide_weights": None if pipe.guide is None else weights_sha256(pipe.guide),
        "seed": options.seed,
        **asked,
        "labels": options.labels,
        **call,
        "guided_channels": pipe.config.get("guided_channels"),
        "sampler": type(pipe.scheduler).__name__,
        "scheduler": scheduler,
    }


def begin_folder(
    options: SampleOptions,
    settings: dict[str, Any],
    subjects: list[int] | list[str],
    class_names: list[str] | None,
) -> list[int]:
    """Begin or continue the folder of images, locked before; a hidden one that other settings left is begun anew.

    Returns the numbers of the images that are still to be drawn.
    """
    try:
        return begin(options.folder, settings, subjects, class_names)
    except InputError:
        if options.single_files:
            raise
        clear(options.folder)
        return begin(options.folder, settings, subjects, class_names)


def assemble(options: SampleOptions, subjects: list[int] | list[str], pipe: GSPNDiTPipeline) -> None:
    """Put the grid or the npz together from the folder of images, and empty a folder that nobody asked for."""
    paths = [options.folder / image_file(i) for i in range(len(subjects))]
    if options.npz_file is not None:
        bar = progress(paths, desc="npz", unit="image", leave=False)
        batches = (load_image(path)[None] for path in bar)
        if pipe.subject == "prompt":
            arrays = {"prompts": np.array(subjects)}
        else:
            ids = np.array(subjects, dtype=np.int64)
            arrays = {"arr_1": ids, "labels": ids}
        if pipe.config.class_names:
            arrays["class_names"] = np.array(pipe.config.class_names)
        save_npz(batches, (len(subjects), *load_image(paths[0]).shape), options.npz_file, **arrays)
    if not options.single_files:
        if options.out is not None:
            images = np.stack([load_image(path) for path in paths])
            save_grid(torch.from_numpy(images).permute(0, 3, 1, 2), options.out, captions(pipe, subjects))
        clear(options.folder)
