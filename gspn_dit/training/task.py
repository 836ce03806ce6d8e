"""What a training is of, as far as the loop knows: a task, of which there is one for each kind of configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, Protocol, Self

from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from gspn_dit.config import LoopConfig, RunConfig
from gspn_dit.launches import Work
from gspn_dit.storage.run_folder import Checkpoint
from gspn_dit.training.ema import EMA
from gspn_dit.training.positions import StepSampler
from gspn_dit.training.record import Record
from gspn_dit.training.stop_request import StopRequest

# By the class of a configuration, where its task is.
TASKS = {
    "Config": "gspn_dit.training.diffusion:DiffusionTask",
    "ClassifierConfig": "gspn_dit.training.classification:ClassificationTask",
    "DistillationConfig": "gspn_dit.training.distillation:DistillationTask",
    "TextToImageConfig": "gspn_dit.training.text_to_image:TextToImageTask",
}


class Images(Protocol):
    """What any training's data say of themselves.

    Attributes:
        class_names: Name of each class.
    """

    @property
    def class_names(self) -> list[str]: ...

    def __len__(self) -> int: ...


class Task(ABC):
    """A training: its data, its network, its loss, and what is looked at on the way.

    It is the same at all steps; what they change is the :class:`~gspn_dit.training.checkpoints.State`. The loop, the
    step and the checkpoints know no more of a training than what is here.

    Attributes:
        config: Its options.
        accelerator: What its processes share.
        same_at_resume: Options that a run keeps from its first step to its last.
    """

    config: RunConfig
    accelerator: Accelerator
    same_at_resume: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def check(cls, config: Any) -> None:
        """Raise :class:`InputError` for options that only a later part of the run would stumble over."""

    @classmethod
    @abstractmethod
    def open(cls, config: Any, accelerator: Accelerator) -> tuple[Self, ModelMixin]:
        """Open everything a configuration names, and make its network, freshly initialised, on the device.

        Raises :class:`InputError` for what cannot be.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """The model's name."""

    @property
    @abstractmethod
    def images(self) -> Images:
        """The images that are learned from."""

    @property
    @abstractmethod
    def samples(self) -> Dataset:
        """What is learned from, by position in the run; item n is a function of the seed and n."""

    @property
    @abstractmethod
    def options(self) -> LoopConfig:
        """`config.training`, with the number of steps."""

    @property
    @abstractmethod
    def num_workers(self) -> int:
        """Processes that read data, per training process."""

    @property
    def collate(self) -> Callable[[Any], Any]:
        """What makes a micro-batch of what the data give at its positions."""
        return default_collate

    @abstractmethod
    def batch(self, samples: Any, step: int) -> Mapping[str, Any]:
        """What the loss needs of a collated micro-batch of a step, which is on the device."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of each image of a micro-batch, (B,) float32."""

    @abstractmethod
    def is_finite(self, batch: Any) -> Tensor:
        """Whether the data of a micro-batch are numbers, () bool."""

    @abstractmethod
    def blame_data(self) -> tuple[str, str]:
        """Where data that are not numbers come from, in words after "the loss is nan, as are", and what to do."""

    @abstractmethod
    def work(self, model: Any, images: int) -> Work:
        """The work of a forward and backward pass of so many images."""

    @abstractmethod
    def rehearse(self, model: Any, images: int, autocast: Any) -> None:
        """Compile and run a few new blocks of the model's kind, as the training will call them."""

    def recompute(self, model: Any) -> None:
        """Have the model's blocks recomputed in the backward pass, as `training.gradient_checkpointing` asks for."""
        model.enable_gradient_checkpointing()

    def start(self, model: Any) -> str | None:
        """Give a new run's model the weights it is to begin with, if any are named; what became of them, in words.

        Raises :class:`InputError` if there are none, or they are another network's.
        """
        return None

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """What the optimiser is given: parameters, and a weight decay or `lr_scale` where theirs is another."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    @property
    @abstractmethod
    def data_record(self) -> dict[str, Any]:
        """What a checkpoint's metadata say of the data, beside their number and their classes."""

    @abstractmethod
    def check_data(self, checkpoint: Checkpoint, saved: Any) -> None:
        """Raise :class:`InputError` if a checkpoint, made with the configuration `saved`, is of other data."""

    @property
    @abstractmethod
    def score_columns(self) -> Sequence[str] | None:
        """The columns of evaluation.csv, asked for on the main process; None if nothing is scored."""

    @abstractmethod
    def look(self, ema: EMA, step: int, scores: Record | None, stop: StopRequest) -> None:
        """Draw and score what is due after a step, by the averaged weights; every process calls this.

        A failure is warned of, and training goes on.

        Args:
            ema: The averaged weights.
            step: The step that was taken.
            scores: evaluation.csv, on the main process.
            stop: Whether this process is asked to stop.
        """

    def steps_after(self, step: int) -> StepSampler:
        """Which positions this process takes at each of the steps after `step`."""
        return steps_after(step, self.options, self.accelerator)

    def due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps (0 is never), and at the last, is to be done now."""
        return bool(every) and (step % every == 0 or step == self.options.max_steps)


def steps_after(step: int, options: LoopConfig, accelerator: Accelerator) -> StepSampler:
    """Which positions a process takes at each of the steps after `step`.

    Raises :class:`InputError` for a batch that does not split evenly.
    """
    return StepSampler(
        step,
        options.max_steps,
        batch_size=options.batch_size,
        accumulation=options.gradient_accumulation_steps,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )


def kind_of(config: RunConfig) -> type[Task]:
    """The task of a configuration."""
    module, _, name = TASKS[type(config).__name__].partition(":")
    return getattr(import_module(module), name)


def open_task(config: RunConfig, accelerator: Accelerator) -> tuple[Task, ModelMixin]:
    """The task of a configuration, and its network. Raises :class:`InputError` for what cannot be."""
    return kind_of(config).open(config, accelerator)


def options_of(config: RunConfig) -> LoopConfig:
    """The part of a configuration that the loop reads: its steps are as they were typed."""
    return config.training  # type: ignore[attr-defined]
