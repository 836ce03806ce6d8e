"""What a run shows of itself on the way: sample grids, and a quick Fréchet distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from gspn_dit.config import Config
from gspn_dit.diffusion import image_generator
from gspn_dit.errors import InputError, not_none, renamed, warn
from gspn_dit.evaluation.evaluate import check_reference, evaluate, statistics_of
from gspn_dit.evaluation.extractors import create_extractor
from gspn_dit.evaluation.image_sets import ImageSet, ReferenceStatistics, open_reference
from gspn_dit.inference.grid import draw_grid
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.training.record import attempt, note
from gspn_dit.training.stop_request import StopRequest


def draw_samples(pipeline: GSPNDiTPipeline, config: Config, accelerator: Accelerator, path: Path) -> bool:
    """A grid of samples, the classes spread over it; the same noise each time, so that grids of a run compare.

    Training goes on after any failure, which is warned of. Whether it went well.
    """
    options = {
        "count": config.sampling.num_images,
        "seed": config.seed,
        "mixed_precision": accelerator.mixed_precision,
        "cuda_graph": config.training.cuda_graph,
    }
    return note(f"no {path}", lambda: draw_grid(pipeline, path, **options))


class Evaluator:
    """The quick score of a run's samples; every process draws its share, the main one scores them.

    Args:
        config: The run's; its features and reference are opened here.
        accelerator: The run's.
        asked: The arguments of the pipeline's call that draw the images of these numbers.
        class_names: The names of the classes that are drawn in turn; none for a model of text.

    Raises:
        InputError: If the features or the reference cannot be had, or do not suit the samples or each other.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        asked: Callable[[Sequence[int]], dict[str, Any]],
        class_names: Sequence[str] = (),
    ) -> None:
        self.config, self.accelerator, self.asked, self.class_names = config, accelerator, asked, class_names
        if accelerator.is_main_process:
            options, size = config.evaluation, config.data.image_size
            with renamed(weights="evaluation.weights", reference="evaluation.reference"):
                self.extractor = create_extractor(options.features, options.weights, device=accelerator.device)
                if (side := self.extractor.image_size) not in (None, size):
                    raise InputError(
                        f"takes {side}x{side}, the samples are {size}x{size}",
                        argument="evaluation.features",
                        value=options.features,
                        wanted="features of that size",
                    )
                self.reference = open_reference(not_none(options.reference), (size, size))
                check_reference(self.reference, (size, size), self.extractor)

    @property
    def columns(self) -> list[str]:
        """The columns of evaluation.csv, on the main process."""
        accuracy = ["class_accuracy"] if self._recognises else []
        return ["step", self.extractor.frechet_key, self.extractor.score_key, *accuracy, "num_samples"]

    @property
    def _recognises(self) -> bool:
        """Whether the features' classes are the run's."""
        return self.extractor.class_names is not None and list(self.extractor.class_names) == list(self.class_names)

    def score(self, pipeline: GSPNDiTPipeline, step: int, stop: StopRequest) -> dict[str, float] | None:
        """The columns' values on the main process; None on the others, or where it failed, which is warned of.

        Training goes on after any failure: nothing here is worth a run.
        """
        images, problem = attempt(self._draw, pipeline, stop)
        problems = gather_object([problem])
        row = None
        if not any(problems):
            images = self._together(not_none(images))
            if self.accelerator.is_main_process:
                row, problem = attempt(self._score, images, pipeline, step)
                problems = [problem]
        if self.accelerator.is_main_process and any(problems):
            warn(f"no evaluation at step {step} ({next(filter(None, problems))}); training goes on")
        return row

    def _draw(self, pipeline: GSPNDiTPipeline, stop: StopRequest) -> Tensor:
        """This process's images, uint8 (n, 3, H, W): i = rank, rank + processes, …; as many for each."""
        options, processes = self.config.evaluation, self.accelerator.num_processes
        each = -(-options.num_samples // processes)
        mine = [min(self.accelerator.process_index + k * processes, options.num_samples - 1) for k in range(each)]
        images = []
        for start in range(0, each, options.batch_size):
            if stop.requested:
                raise InterruptedError("asked to stop")
            batch = mine[start : start + options.batch_size]
            (drawn,) = pipeline(
                **self.asked(batch),
                guidance_scale=options.guidance_scale,
                generator=[image_generator(self.config.seed, i) for i in batch],
                mixed_precision=self.accelerator.mixed_precision,
                cuda_graph=self.config.training.cuda_graph,
                output_type="uint8",
                return_dict=False,
            )
            images.append(drawn.cpu())
        return torch.cat(images)

    def _together(self, images: Tensor) -> Tensor:
        """All processes' images in order, on the CPU."""
        parts = [
            self.accelerator.gather(part.to(self.accelerator.device)).cpu().unflatten(0, (-1, len(part)))
            for part in images.split(self.config.evaluation.batch_size)
        ]  # (processes, n, 3, H, W) each
        return torch.cat(parts, dim=1).transpose(0, 1).flatten(0, 1)[: self.config.evaluation.num_samples]

    def _score(self, images: Tensor, pipeline: GSPNDiTPipeline, step: int) -> dict[str, float]:
        if not isinstance(self.reference, ReferenceStatistics):  # gone through once in a run: they stay the same
            self.reference = statistics_of(self.reference, self.extractor, quick=True)
        labels = [i % len(self.class_names) for i in range(len(images))] if self.class_names else None
        (height, width), names = images.shape[2:], dict(enumerate(self.class_names))
        samples = ImageSet(
            f"samples at step {step}", len(images), (height, width), lambda i: images[i], labels, class_names=names
        )
        figures = evaluate(samples, self.reference, self.extractor, quick=True)
        return {"step": step} | {name: float(figures.get(name, "nan")) for name in self.columns[1:]}
