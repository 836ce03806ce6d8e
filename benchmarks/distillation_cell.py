"""One mixer with one seed of `benchmarks.distillation`: how it is taught, and how it is judged."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from benchmarks.commands import DistillationOptions
from benchmarks.machine import machine
from benchmarks.result_files import noted
from gspn_dit.autoencoder import downsampling
from gspn_dit.demo.scene_reading import caption_accuracy
from gspn_dit.demo.scenes import IMAGE_SIZE, Scenes
from gspn_dit.diffusion import image_generator
from gspn_dit.diffusion.stable_diffusion import StableDiffusion
from gspn_dit.distillation_config import (
    DistillationConfig,
    DistillationDataConfig,
    DistillationTrainingConfig,
    LossConfig,
    ReplacementConfig,
)
from gspn_dit.evaluation.extractors import create_extractor
from gspn_dit.evaluation.metrics import frechet_distance
from gspn_dit.evaluation.moments import Moments, Statistics
from gspn_dit.inference.decoding import decode_images, encode_image
from gspn_dit.inference.generate import Drawing
from gspn_dit.inference.prompts import encode_prompts
from gspn_dit.inference.replacements import load_replacement
from gspn_dit.inference.stages import Stage, ladder
from gspn_dit.inference.text_to_image import load_text_to_image
from gspn_dit.models.attention_replacement import AttentionReplacement
from gspn_dit.storage.files import write_json
from gspn_dit.storage.pictures import save_image
from gspn_dit.storage.run_folder import Checkpoint, RunFolder
from gspn_dit.training.distillation import unet_inputs
from gspn_dit.training.loop import train
from gspn_dit.training.record import read_metrics

TEACHER = "teacher"  # among the mixers: nothing is replaced
PROMPTS, REFERENCE = 1, 2  # seeds of the scenes whose captions are drawn, and of those that pictures are compared with
REFERENCES = 1000
ERRORS = {1: 64, 2: 16, 4: 4}  # scenes on which predictions are compared, by how many times as large they are shown
SHOWN = 6  # pictures of a view that are kept
AT_ONCE = 16  # pictures of the trained size


@dataclass(frozen=True)
class View:
    """A way to look at a model.

    Args:
        name: In the tables.
        split: Of the scenes whose captions are drawn; those of `test` have a combination that no training caption has.
        times: The picture's side over the trained one.
        by_ladder: Whether it is drawn at the trained size and enlarged twofold by image-to-image until it has its size.
        share: Of the pictures at the trained size, how many are drawn.
    """

    name: str
    split: str = "train"
    times: int = 1
    by_ladder: bool = False
    share: float = 1.0

    @property
    def file_name(self) -> str:
        """Its name in files' names."""
        return self.name.replace("×", "x").replace(",", "").replace(" ", "-")

    def stages(self, num_inference_steps: int, factor: int) -> list[Stage]:
        """What its pictures go through."""
        if self.by_ladder:
            first = Stage(IMAGE_SIZE, IMAGE_SIZE, num_inference_steps)
            return ladder(first, factor, [2.0] * round(math.log2(self.times)), None, None)
        return [Stage(self.times * IMAGE_SIZE, self.times * IMAGE_SIZE, num_inference_steps)]


VIEWS = (
    View("1×"),
    View("1×, new things", split="test"),
    View("2×", times=2, share=0.5),
    View("4×", times=4, share=0.125),
    View("2× by ladder", times=2, by_ladder=True, share=0.5),
    View("4× by ladder", times=4, by_ladder=True, share=0.125),
)


def cell_config(folder: Path, mixer: str, seed: int, options: DistillationOptions) -> DistillationConfig:
    """The first stage of a mixer with a seed where the folder is called `layerwise`, else the second."""
    layerwise = folder.name == "layerwise"
    steps = options.layerwise_steps if layerwise else options.steps
    first = folder.with_name("layerwise")
    return DistillationConfig(
        output_dir=str(folder),
        resume="auto",
        seed=seed,
        base=options.teacher,
        replacement=ReplacementConfig(
            mixer=mixer,  # type: ignore[arg-type]  # it was looked at
            chunk=options.chunk,
            init_from=None if layerwise or not options.layerwise_steps else str(first),
        ),
        data=DistillationDataConfig(options.data, image_size=IMAGE_SIZE, num_workers=0),
        distillation=LossConfig("layerwise" if layerwise else "end-to-end"),
        training=DistillationTrainingConfig(
            max_steps=steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_schedule="cosine",
            warmup_steps=max(1, steps // 20),
            max_grad_norm=1.0,
            ema_decay=0.99,
            log_every=10,
            checkpoint_every=200,
            keep_checkpoints=1,
            trackers=[],
        ),
    )


@dataclass(frozen=True)
class Cell:
    """One mixer with one seed.

    Args:
        folder: Where its runs and its result are.
        mixer: Its name, or TEACHER.
        seed: Of new weights, of the order of latents, and of the noise that pictures begin with.
        options: The benchmark's.
    """

    folder: Path
    mixer: str
    seed: int
    options: DistillationOptions

    @property
    def result(self) -> Path:
        """What is known of it once it is judged."""
        return self.folder / "result.json"

    def finish(self) -> bool:
        """Teach from wherever it was left to the last step and judge; False if it was asked to stop before that step.

        Raises :class:`gspn_dit.training.step.NonFiniteLoss` at a step whose loss or gradient is not finite.
        """
        pipe = load_text_to_image(self.options.teacher)
        taught: dict[str, Any] = {}
        replacement = None
        if self.mixer != TEACHER:
            runs = [RunFolder(self.folder / "run")]
            if self.options.layerwise_steps:
                runs.insert(0, RunFolder(self.folder / "layerwise"))
            checkpoints = [self._finished(run) for run in runs]
            if None in checkpoints:
                return False
            replacement = load_replacement(self.folder / "run")
            replacement.mount(pipe)
            taught = {
                "parameters": sum(p.numel() for p in replacement.parameters()),
                "losses": {
                    run.path.name: [(row["step"], row["loss"]) for row in read_metrics(run.metrics)] for run in runs
                },
            }
        views = {view.name: self._judge(view, pipe) for view in VIEWS}
        errors = None if replacement is None else prediction_errors(pipe, replacement)
        result = {
            "mixer": self.mixer,
            "seed": self.seed,
            "machine": machine(),
            "views": views,
            "errors": errors,
            **taught,
        }
        if replacement is not None:
            replacement.unmount()
            replacement.save_pretrained(self.folder / "layers")
            for run in runs:
                shutil.rmtree(run.checkpoints)
        write_json(self.result, noted(result))
        return True

    def _finished(self, run: RunFolder) -> Checkpoint | None:
        """The last checkpoint of one of its runs, trained from wherever it was; None if it was asked to stop before."""
        config = cell_config(run.path, self.mixer, self.seed, self.options)
        newest = run.newest_checkpoint()
        if newest is None or newest.step < config.training.max_steps:
            train(config)
            newest = run.newest_checkpoint()
        return newest if newest is not None and newest.step == config.training.max_steps else None

    def _judge(self, view: View, pipe: StableDiffusionPipeline) -> dict[str, float]:
        """What a view shows: shares of captions that are right, and the Fréchet distance to real scenes."""
        scenes = Scenes(view.split, seed=PROMPTS)
        captions = [scenes.caption(i) for i in range(max(2, round(view.share * self.options.images)))]
        stages = view.stages(self.options.num_inference_steps, downsampling(pipe.vae))
        drawing = Drawing(pipe, stages, self.options.guidance_scale, None, self.seed, "off")
        pictures = list(draw(drawing, captions))
        for i, picture in enumerate(pictures[:SHOWN]):
            folder = self.folder / "pictures" / view.file_name
            folder.mkdir(parents=True, exist_ok=True)
            save_image(picture, folder / f"{i}.png")
        found = caption_accuracy(pictures, captions)
        return {**found, "fd": frechet_distance(moments(pictures), reference()), "images": len(pictures)}


def draw(drawing: Drawing, captions: Sequence[str]) -> Iterator[Tensor]:
    """A picture uint8 (3, H, W) of each caption, drawn through all stages."""
    count = drawing.together(len(drawing.stages) - 1, AT_ONCE)
    if len(drawing.stages) == 1:
        count = max(1, AT_ONCE * IMAGE_SIZE**2 // math.prod(drawing.stages[0].size))
    for start in range(0, len(captions), count):
        images, latents = range(start, min(start + count, len(captions))), None
        for number in range(len(drawing.stages)):
            latents = drawing.draw(number, images, [captions[i] for i in images], latents, lambda: None)
        yield from decode_images(drawing.pipe.vae, latents, "uint8")


def moments(pictures: Sequence[Tensor]) -> Statistics:
    """Of the features that the packaged classifier of photographs has of pictures, which it sees at 64 pixels."""
    extractor = create_extractor("photos")
    found = Moments(64)
    for picture in pictures:
        found.update(torch.empty(0), extractor(picture[None])[extractor.features])
    return found.statistics()


@cache
def reference() -> Statistics:
    """Of real scenes, of another seed than those whose captions are drawn."""
    scenes = Scenes("train", seed=REFERENCE)
    return moments([scenes[i][0] for i in range(REFERENCES)])


@torch.inference_mode()
def prediction_errors(pipe: StableDiffusionPipeline, replacement: AttentionReplacement) -> dict[str, float]:
    """Mean square of a mounted UNet's prediction less its teacher's, by how many times as large scenes are shown.

    The times of a size's scenes stand evenly in the chain.
    """
    objective, found = StableDiffusion.of(pipe.scheduler), {}
    scenes = Scenes("train", seed=PROMPTS)
    for times, count in ERRORS.items():
        total, side = 0.0, times * IMAGE_SIZE
        for i in range(count):
            picture = Image.fromarray(scenes[i][0].permute(1, 2, 0).numpy())
            large = np.array(picture.resize((side, side), Image.Resampling.LANCZOS))
            clean = encode_image(pipe.vae, torch.from_numpy(large).permute(2, 0, 1))
            noise = torch.randn(clean.shape, generator=image_generator(0, i))
            time = objective.times(torch.tensor([(i + 0.5) / count]))
            told, _ = encode_prompts(pipe, [scenes.caption(i)], None, False)
            inputs = unet_inputs(objective.noisy(clean, time, noise), time, told.arguments((side, side)))
            predicted = pipe.unet(**inputs)[0]
            with replacement.unmounted():
                taught = pipe.unet(**inputs)[0]
            total += (predicted - taught).square().mean().item()
        found[f"{times}×"] = total / count
    return found
