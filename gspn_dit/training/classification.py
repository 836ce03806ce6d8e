"""The training of an image classifier: what it is made of, opened and checked before any step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn

from gspn_dit.classifier_config import AugmentationConfig, ClassifierConfig, ClassifierTrainingConfig
from gspn_dit.data.pictures import Pictures, open_training
from gspn_dit.data.preparation import Preparation, Prepared
from gspn_dit.data.workers import load
from gspn_dit.errors import InputError, not_none, renamed, warn
from gspn_dit.evaluation.accuracy import COLUMNS, scores, tally
from gspn_dit.inference.image_classifier import load_classifier
from gspn_dit.launches import Work
from gspn_dit.models import create_classifier
from gspn_dit.models.classifier import GSPNClassifier
from gspn_dit.models.compiled_blocks import compile_blocks
from gspn_dit.models.macs import count_macs
from gspn_dit.storage.run_folder import Checkpoint
from gspn_dit.training.ema import EMA
from gspn_dit.training.image_stream import Mixing, ResizedImages, Resizing, Samples, ShiftedImages
from gspn_dit.training.record import Record, attempt
from gspn_dit.training.sharding import full_tensor
from gspn_dit.training.stop_request import StopRequest
from gspn_dit.training.task import Task, steps_after
from gspn_dit.training.trackers import note_scores

OVERRIDES = "model.overrides."
SET_BY_DATA = ("num_classes", "in_chans", "pretrained_cfg", "features_only", "out_indices", "global_pool")


@dataclass
class ClassificationTask(Task):
    """A classifier and its pictures.

    Args:
        config: Its options.
        accelerator: What its processes share.
        pictures: What is learned from.
        stream: The same, altered, by position.
        judged: What the averaged weights are judged by, or None for nothing.
        build: Makes another network of the same kind, on the default device.
        training: `config.training` with the number of steps.
    """

    config: ClassifierConfig
    accelerator: Accelerator
    pictures: Pictures
    stream: ResizedImages | ShiftedImages
    judged: Prepared | None
    build: Callable[[], GSPNClassifier]
    training: ClassifierTrainingConfig

    same_at_resume = (
        "seed",
        "model.name",
        "model.overrides",
        "data.image_size",
        "data.mean",
        "data.std",
        "training.batch_size",
    )

    def __post_init__(self) -> None:
        options, classes = self.config.augmentation, len(self.pictures.class_names)
        self.mixing = Mixing(options, classes, self.config.seed) if options.mixes else None
        self.resizing = Resizing(options.sizes, self.config.seed) if options.sizes is not None else None
        self._averaged: GSPNClassifier | None = None

    @classmethod
    def check(cls, config: ClassifierConfig) -> None:
        if taken := [name for name in SET_BY_DATA if name in config.model.overrides]:
            raise InputError("the data set it", argument=OVERRIDES + taken[0], remedy="leave it out")
        for key in ("compile", "cuda_graph"):
            if config.augmentation.sizes is not None and getattr(config.training, key) is True:
                raise InputError(
                    "steps' images are of several sizes (augmentation.sizes)",
                    argument=f"training.{key}",
                    value=True,
                    remedy="give false",
                )

    @classmethod
    def open(cls, config: ClassifierConfig, accelerator: Accelerator) -> tuple[ClassificationTask, GSPNClassifier]:
        data = config.data
        with renamed("data."):
            pictures, judged = open_training(data.source, data.image_size, data.class_names, data.validation)
        if judged is None and config.evaluation.is_on:
            raise InputError(
                f"{data.source} has no validation images",
                argument="data.validation",
                value=None,
                remedy="give a folder of them, or --evaluation.every-epochs 0",
            )
        training = with_steps(config.training, len(pictures))
        if config.augmentation.sizes is not None:  # what `auto` would choose is made for one size
            training = dataclasses.replace(training, compile=False, cuda_graph=False)
        check_pairs(steps_after(0, training, accelerator).micro_batch, config.augmentation)
        set_seed(config.seed)
        build = partial(build_classifier, config, pictures)
        with renamed(OVERRIDES, name="model.name"):
            model = build().to(accelerator.device)
        learned = Preparation.of(model.pretrained_cfg)
        stream: ResizedImages | ShiftedImages
        if config.augmentation.crop == "shift":
            stream = ShiftedImages(pictures, learned, config.augmentation, config.seed, training.batch_size)
        else:
            stream = ResizedImages(pictures, learned, config.augmentation, config.seed)
        seen = None
        if judged is not None and config.evaluation.is_on:
            wanted = config.evaluation
            seen = Prepared(judged, learned.changed(wanted.image_size, wanted.crop_pct, wanted.interpolation))
        return cls(config, accelerator, pictures, stream, seen, build, training), model

    @property
    def name(self) -> str:
        return self.config.model.name

    @property
    def images(self) -> Pictures:
        return self.pictures

    @property
    def samples(self) -> ResizedImages | ShiftedImages:
        return self.stream

    @property
    def options(self) -> ClassifierTrainingConfig:
        return self.training

    @property
    def num_workers(self) -> int:
        return self.config.data.num_workers

    @property
    def collate(self) -> Callable[[Any], Any]:
        return self.stream.collate

    def batch(self, samples: Samples, step: int) -> dict[str, Tensor]:
        images, targets = samples["images"], samples["labels"]
        if self.mixing is not None:
            images, targets = self.mixing(images, targets, step)
        if self.resizing is not None:
            images = self.resizing(images, step)
        return {"images": images, "targets": targets}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy (B,), of classes or, where images are mixed, of shares of classes."""
        logits = model(batch["images"]).float()
        smoothing = 0.0 if self.mixing is not None else self.config.augmentation.label_smoothing
        return F.cross_entropy(logits, batch["targets"], reduction="none", label_smoothing=smoothing)

    def is_finite(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["images"].isfinite().all()

    def blame_data(self) -> tuple[str, str]:
        return f"images of its batch from data.source={self.config.data.source!r}", "Check data.mean and data.std"

    def work(self, model: GSPNClassifier, images: int) -> Work:
        side = self.config.data.image_size
        with torch.device("meta"):
            macs = count_macs(self.build(), (side, side))
        return Work(sum(spec.depth for spec in model.specs), macs, images, training=True)

    def rehearse(
        self, model: GSPNClassifier, images: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> None:
        """With one block for each stage."""
        device, side = self.accelerator.device, self.config.data.image_size
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            small = type(model).from_config({**model.config, "depths": [1] * len(model.specs)}).to(device).train()
            compile_blocks(small, self.options.compile_mode)
            with autocast():
                logits = small(torch.zeros(images, model.in_chans, side, side, device=device))
            logits.float().sum().backward()

    def start(self, model: GSPNClassifier) -> str | None:
        if self.config.model.init_from is None:
            return None
        return start_from(model, self.config.model.init_from)

    def parameter_groups(self, model: GSPNClassifier) -> list[dict[str, Any]]:
        return parameter_groups(model, self.training.weight_decay, self.training.layer_decay)

    @property
    def data_record(self) -> dict[str, Any]:
        return {}

    def check_data(self, checkpoint: Checkpoint, saved: ClassifierConfig) -> None:
        """Their number and their classes, which are compared for every task, are all there is."""

    @property
    def score_columns(self) -> Sequence[str] | None:
        return ("step", *COLUMNS) if self.judged is not None else None

    def look(self, ema: EMA, step: int, scores: Record | None, stop: StopRequest) -> None:
        """The accuracy on the validation images, where it is due."""
        if self.judged is not None and self.is_judged_at(step) and (row := self.judge(ema, step, stop)):
            note_scores(not_none(scores), self.accelerator, row)  # of the main process, which alone has a row

    def is_judged_at(self, step: int) -> bool:
        """Whether averaged weights are judged after a step."""
        options, last = self.config.evaluation, self.training.max_steps
        if options.every:
            return self.due(step, options.every)
        if not options.every_epochs:
            return False
        epochs = [n * self.training.batch_size / len(self.pictures) / options.every_epochs for n in (step - 1, step)]
        return step == last or math.floor(epochs[1]) > math.floor(epochs[0])

    def judge(self, ema: EMA, step: int, stop: StopRequest) -> dict[str, float] | None:
        """Accuracy of the averaged weights on the main process; None on the others, or where it failed.

        Every process judges its share. Training goes on after a failure, which is warned of.
        """
        sums, problem = attempt(self._tally, self._network_of(ema), stop)
        problem = next(filter(None, gather_object([problem])), None)
        row: dict[str, float] | None = None
        if problem is None:
            total = self.accelerator.reduce(not_none(sums).to(self.accelerator.device), "sum")
            row, problem = attempt(scores, total.cpu())
        if not self.accelerator.is_main_process:
            return None
        if row is None:
            warn(f"no evaluation at step {step} ({problem}); training goes on")
            return None
        return {"step": step} | {name: float(value) for name, value in row.items()}

    def _tally(self, model: nn.Module, stop: StopRequest) -> Tensor:
        judged, accelerator = not_none(self.judged), self.accelerator
        batches = judged.shares(self.config.evaluation.batch_size, accelerator.process_index, accelerator.num_processes)

        def loaded() -> Iterable[tuple[Tensor, Tensor]]:
            workers = 0 if judged.in_memory else self.num_workers
            for batch in load(judged, batches, workers, judged.collate, generator=torch.Generator()):
                if stop.requested:
                    raise InterruptedError("asked to stop")
                yield batch

        return tally(model, loaded(), accelerator.device, accelerator.autocast)

    def _network_of(self, ema: EMA) -> nn.Module:
        """A network of the averaged weights, in evaluation mode; every process calls this."""
        if self._averaged is None:
            device = self.accelerator.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
                self._averaged = self.build().eval().requires_grad_(False)
        parameters = dict(self._averaged.named_parameters())
        for name, tensor in ema.tensors.items():
            parameters[name].copy_(full_tensor(tensor))
        return self._averaged


def with_steps(options: ClassifierTrainingConfig, num_images: int) -> ClassifierTrainingConfig:
    """The options with their steps and warm-up in steps, of data of so many images."""
    epoch = num_images / options.batch_size
    warmup = math.ceil(options.warmup_epochs * epoch) or options.warmup_steps
    steps = options.max_steps or math.ceil(options.epochs * epoch)
    return dataclasses.replace(options, max_steps=steps, warmup_steps=warmup, warmup_epochs=0.0)


def check_pairs(micro_batch: int, options: AugmentationConfig) -> None:
    """Raise :class:`InputError` for a micro-batch without pairs, where images are mixed."""
    if options.mixes and micro_batch % 2:
        raise InputError(
            f"leaves {micro_batch} images for each process and pass, and they are mixed in pairs",
            argument="training.batch_size",
            wanted="an even number of them; or augmentation.mixup=0 and augmentation.cutmix=0",
        )


def build_classifier(config: ClassifierConfig, pictures: Pictures) -> GSPNClassifier:
    """A new network for pictures of that many classes and channels, which knows how they are prepared.

    Raises :class:`InputError` for an unknown name or override, a value that it cannot take, or a normalisation of
    another number of channels.
    """
    data, judged, side = config.data, config.evaluation, config.data.image_size
    given = {
        "mean": data.mean,
        "std": data.std,
        "crop_pct": judged.crop_pct,
        "interpolation": judged.interpolation,
        "label_names": pictures.class_names,
        "input_size": (pictures.channels, side, side),
    }
    for key in ("mean", "std"):
        values = getattr(data, key)
        if values is not None and len(values) != pictures.channels:
            raise InputError(argument=f"data.{key}", value=values, wanted=f"{pictures.channels}, one for each channel")
    return create_classifier(
        config.model.name,
        num_classes=len(pictures.class_names),
        in_chans=pictures.channels,
        pretrained_cfg={key: value for key, value in given.items() if value is not None},
        **config.model.overrides,
    )


def parameter_groups(model: GSPNClassifier, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """The model's parameters as AdamW takes them: no decay of vectors and of what the model names.

    Args:
        model: A classifier.
        weight_decay: Of the others.
        layer_decay: Share of the rate that each of timm's groups of layers learns at, of that of the one after it.
    """
    spared = model.no_weight_decay()
    if layer_decay < 1:
        from timm.optim import param_groups_layer_decay

        return param_groups_layer_decay(
            model, weight_decay=weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay
        )
    decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed[parameter.ndim > 1 and name not in spared].append(parameter)
    return [{"params": decayed[True], "weight_decay": weight_decay}, {"params": decayed[False], "weight_decay": 0.0}]


def start_from(model: GSPNClassifier, path: str) -> str | None:
    """Give a new classifier the averaged weights of a run, a checkpoint or a model folder.

    Returns:
        What became of the head, if the numbers of classes differ.

    Raises:
        InputError: If there are none, or they are another network's.
    """
    with renamed(model="model.init_from"):
        source = load_classifier(path)
    theirs, ours = dict(source.named_parameters()), dict(model.named_parameters())
    head = {name for name in ours if name.startswith("head.")}
    for name in theirs | ours:
        found, wanted = (tuple(of[name].shape) if name in of else "not there" for of in (theirs, ours))
        if found != wanted and name not in head:
            raise InputError(
                f"its {name} is {found}, this model's {wanted}",
                argument="model.init_from",
                value=path,
                wanted="the same model.name and model.overrides",
            )
    same_classes = source.pretrained_cfg.get("label_names") == model.pretrained_cfg.get("label_names")
    with torch.no_grad():
        for name, parameter in ours.items():
            if name not in head or same_classes:
                parameter.copy_(theirs[name])
    return None if same_classes else f"{path} knows other classes: the head begins anew"
