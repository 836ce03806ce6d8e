"""One model of `benchmarks.classification`: what it is made of, how it is trained and judged, how fast it trains."""

from __future__ import annotations

import functools
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.commands import ClassificationOptions
from benchmarks.machine import machine
from benchmarks.result_files import noted
from gspn_dit.classifier_config import (
    AugmentationConfig,
    ClassifierConfig,
    ClassifierDataConfig,
    ClassifierEvaluationConfig,
    ClassifierModelConfig,
    ClassifierTrainingConfig,
)
from gspn_dit.data.pictures import open_judged
from gspn_dit.data.preparation import Preparation, Prepared
from gspn_dit.evaluation.accuracy import scores, tally
from gspn_dit.inference.image_classifier import load_classifier
from gspn_dit.models import create_classifier
from gspn_dit.models.macs import count_macs
from gspn_dit.precision import autocast
from gspn_dit.storage.files import write_json
from gspn_dit.storage.run_folder import RunFolder
from gspn_dit.training.classification import ClassificationTask
from gspn_dit.training.loop import load_batches, prepare, train
from gspn_dit.training.record import read_metrics
from gspn_dit.training.step import take_step
from gspn_dit.training.stop_request import StopRequest

NAME, SIDE = "gspn-grouped-pico", 28
DESIGN: dict[str, Any] = {"widths": [48], "depths": [2], "stem_stride": 4, "group_width": 16}
SHOWN = {14: 1, 20: 1, 28: 1, 40: 2, 56: 2}  # at a side in pixels, every so many of the test pictures are judged
ROUNDS, STEPS = 5, 8  # of the speed: how often each mixer has its turn, and how long that is


@functools.cache
def size_of(mixer: str, mlp_ratio: float) -> tuple[int, int]:
    """Parameters of a model, and its multiply-accumulates for a picture of 28 pixels."""
    with torch.device("meta"):
        model = create_classifier(NAME, **DESIGN, mixer=mixer, mlp_ratio=mlp_ratio)
    return model.num_parameters(), count_macs(model, (SIDE, SIDE))


@functools.cache
def mlp_ratio(mixer: str) -> float:
    """Hidden width over width of a mixer's feed-forward: 4 for ours, for others the eighth nearest to our cost."""
    if mixer == "gspn":
        return 4.0
    ours, at_one, at_two = size_of("gspn", 4.0)[1], size_of(mixer, 1.0)[1], size_of(mixer, 2.0)[1]
    return round(8 * (1 + (ours - at_one) / (at_two - at_one))) / 8  # the cost is linear in it


def cell_config(folder: Path, mixer: str, seed: int, options: ClassificationOptions) -> ClassifierConfig:
    """A training of one mixer with one seed."""
    return ClassifierConfig(
        output_dir=str(folder),
        resume="auto",
        seed=seed,
        model=ClassifierModelConfig(NAME, {**DESIGN, "mixer": mixer, "mlp_ratio": mlp_ratio(mixer)}),
        data=ClassifierDataConfig(options.data, image_size=SIDE, num_workers=0),
        augmentation=AugmentationConfig(
            "shift", max_shift=1, sizes=options.sizes, color_jitter=0.0, label_smoothing=0.1
        ),
        training=ClassifierTrainingConfig(
            max_steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            weight_decay=0.05,
            lr_schedule="cosine",
            warmup_steps=max(1, options.steps // 20),
            max_grad_norm=1.0,
            ema_decay=0.99,
            compile=False,
            log_every=10,
            checkpoint_every=500,
            keep_checkpoints=1,
            trackers=[],
        ),
        evaluation=ClassifierEvaluationConfig(every_epochs=0),
    )


@dataclass(frozen=True)
class Cell:
    """One mixer with one seed.

    Args:
        folder: Where its run and its result are.
        mixer: Its name.
        seed: Of weights, pictures' order and how they are altered.
        options: The benchmark's.
    """

    folder: Path
    mixer: str
    seed: int
    options: ClassificationOptions

    @property
    def run(self) -> RunFolder:
        """Its training's run."""
        return RunFolder(self.folder / "run")

    @property
    def result(self) -> Path:
        """What is known of it once it is judged."""
        return self.folder / "result.json"

    def finish(self) -> bool:
        """Train from wherever it was left to the last step and judge; False if it was asked to stop before that step.

        Raises :class:`gspn_dit.training.step.NonFiniteLoss` at a step whose loss or gradient is not finite.
        """
        train(cell_config(self.run.path, self.mixer, self.seed, self.options))
        checkpoint = self.run.newest_checkpoint()
        if checkpoint is None or checkpoint.step < self.options.steps:
            return False
        parameters, macs = size_of(self.mixer, mlp_ratio(self.mixer))
        result = {
            "mixer": self.mixer,
            "seed": self.seed,
            "steps": checkpoint.step,
            "mlp_ratio": mlp_ratio(self.mixer),
            "parameters": parameters,
            "macs": macs,
            "machine": machine(),
            "top1": judge(checkpoint.ema, self.options.data),
            "losses": [(row["step"], row["loss"]) for row in read_metrics(self.run.metrics)],
        }
        shutil.copytree(checkpoint.ema, self.folder / "model", dirs_exist_ok=True)
        write_json(self.result, noted(result))
        shutil.rmtree(self.run.checkpoints)
        return True


def judge(folder: Path, data: str) -> dict[str, float]:
    """Top-1 accuracy in percent of a saved classifier on test pictures shown at each side of `SHOWN`, by the side."""
    model = load_classifier(folder)
    preparation, found = Preparation.of(model.pretrained_cfg), {}
    precision = functools.partial(autocast, model.device, "no")
    for side, every in SHOWN.items():
        pictures = Prepared(open_judged(data), preparation.changed(side, None, None))
        batches = (pictures.__getitems__(share) for share in pictures.shares(250, 0, every))
        found[str(side)] = scores(tally(model, batches, model.device, precision))["top1"]
    return found


def measure_speed(configs: Mapping[str, ClassifierConfig]) -> dict[str, float]:
    """Images a second of each training, which have their turns: of all turns the median."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    rates: dict[str, list[float]] = {mixer: [] for mixer in configs}
    runs = {}
    for mixer, config in configs.items():
        steps = (1 + ROUNDS) * STEPS + 1  # one more is fetched ahead
        task, model = ClassificationTask.open(
            replace(config, training=replace(config.training, max_steps=steps)), accelerator
        )
        runs[mixer] = (task, prepare(task, model, is_new=True), load_batches(task, 0))
    for turn in range(1 + ROUNDS):
        for mixer, (task, state, batches) in runs.items():
            begun = time.perf_counter()
            for step in range(turn * STEPS + 1, (turn + 1) * STEPS + 1):
                take_step(task, state, batches, step, StopRequest(), may_skip=False)
            rates[mixer].append(STEPS * task.options.batch_size / (time.perf_counter() - begun))
    return {mixer: statistics.median(of_turns[1:]) for mixer, of_turns in rates.items()}  # the first gets things going
