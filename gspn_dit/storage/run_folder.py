"""Where each file of a run lies, and of each checkpoint in it: the only place that spells these names.

RUN/config.yaml                         how the model is trained
RUN/class_names.json                    the classes' names, by class id
RUN/metrics.csv, loss.png               the training loss every few steps, and its curve
RUN/evaluation.csv                      the quick scores during training
RUN/metrics.json                        the scores of the newest checkpoint, if an evaluation was written there
RUN/samples/step-0001000.png …          the grid of samples of a step
RUN/logs/                               what the trackers write
RUN/posthoc-ema/config.json             the model's configuration, for the averages beside it
RUN/posthoc-ema/step-0001000-sigma-0.05.safetensors …   an average at a step, float16
RUN/checkpoints/step-0001000/           a checkpoint:

model.safetensors                       the weights, float32, by parameter name
optimizer.safetensors                   AdamW's state: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`
ema/                                    the averaged model, as from_pretrained reads it
power-ema-0.05.safetensors …            the post-hoc EMA's running averages, if it is on
config.yaml, class_names.json           as the run's
metadata.json                           the step, the VAE, and size and SHA-256 of every other file
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspn_dit.errors import InputError
from gspn_dit.storage.files import alone_in

CONFIG, CLASS_NAMES, METADATA = "config.yaml", "class_names.json", "metadata.json"
_CHECKPOINTS, _EMA, _POSTHOC_EMA = "checkpoints", "ema", "posthoc-ema"


@dataclass(frozen=True)
class Checkpoint:
    """The folder of one checkpoint; it may lie anywhere, and need not be there yet."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The folder's name: `step-0001000` in a run."""
        return self.path.name

    @property
    def step(self) -> int:
        """The step that a checkpoint in a run is named after."""
        return int(self.name.removeprefix("step-"))

    @property
    def run(self) -> RunFolder | None:
        """The run that the checkpoint lies in; None if it lies by itself."""
        run = RunFolder(self.path.parent.parent)
        return run if self in run.list_checkpoints() else None

    @property
    def weights(self) -> Path:
        """The trained weights."""
        return self.path / "model.safetensors"

    @property
    def optimizer(self) -> Path:
        """The optimiser's state."""
        return self.path / "optimizer.safetensors"

    @property
    def ema(self) -> Path:
        """The folder of the averaged model; sampling needs this one."""
        return self.path / _EMA

    @property
    def ema_weights(self) -> Path:
        """The averaged weights."""
        return self.ema / "diffusion_pytorch_model.safetensors"

    @property
    def ema_config(self) -> Path:
        """The averaged model's configuration."""
        return self.ema / "config.json"

    def power_ema(self, sigma_rel: float) -> Path:
        """The post-hoc EMA's running average of a relative width."""
        return self.path / f"power-ema-{sigma_rel:g}.safetensors"

    @property
    def config(self) -> Path:
        """The run's configuration as it was at this step."""
        return self.path / CONFIG

    @property
    def class_names(self) -> Path:
        """The classes' names."""
        return self.path / CLASS_NAMES

    @property
    def metadata(self) -> Path:
        """What is known of the checkpoint: its step, its VAE, its files."""
        return self.path / METADATA

    @property
    def is_complete(self) -> bool:
        """Whether it has the parts that are written first and last; their contents are not looked at."""
        return self.metadata.is_file() and self.ema.is_dir()

    def read_metadata(self) -> dict[str, Any]:
        """The metadata. Raises OSError or ValueError."""
        return json.loads(self.metadata.read_text())

    def read_class_names(self) -> list[str]:
        """The classes' names, by class id. Raises OSError or ValueError."""
        return json.loads(self.class_names.read_text())


@dataclass(frozen=True)
class Snapshot:
    """An average that the post-hoc EMA has written: of step `step`, of relative width `sigma_rel`."""

    path: Path
    step: int
    sigma_rel: float


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; it need not be there yet."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        """Whether the folder is that of a run, with or without a checkpoint."""
        return self.checkpoints.is_dir() or self.config.is_file()

    @property
    def config(self) -> Path:
        """The run's configuration, of its last start."""
        return self.path / CONFIG

    @property
    def class_names(self) -> Path:
        """The classes' names."""
        return self.path / CLASS_NAMES

    @property
    def metrics(self) -> Path:
        """The table of the training loss."""
        return self.path / "metrics.csv"

    @property
    def loss_picture(self) -> Path:
        """The curve of the training loss."""
        return self.path / "loss.png"

    @property
    def evaluation(self) -> Path:
        """The table of quick scores during training."""
        return self.path / "evaluation.csv"

    @property
    def scores(self) -> Path:
        """The scores of the newest checkpoint, where the command `gspn-dit evaluate` was told to write them here."""
        return self.path / "metrics.json"

    def samples(self, step: int) -> Path:
        """The grid of samples of a step."""
        return self.path / "samples" / f"{_step_name(step)}.png"

    @property
    def logs(self) -> Path:
        """The trackers' folder."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / _CHECKPOINTS

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of a step, whether or not there is one."""
        return Checkpoint(self.checkpoints / _step_name(step))

    def list_checkpoints(self) -> list[Checkpoint]:
        """The checkpoints there are, oldest first; what is only half there is none."""
        found = (Checkpoint(path) for path in self.checkpoints.glob("step-*") if re.fullmatch("step-[0-9]+", path.name))
        return sorted((each for each in found if each.is_complete), key=lambda each: each.step)

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint; None if there is none yet."""
        return next(reversed(self.list_checkpoints()), None)

    @property
    def snapshots_config(self) -> Path:
        """The configuration of the model whose averages the post-hoc EMA writes."""
        return self.path / _POSTHOC_EMA / "config.json"

    def snapshot(self, step: int, sigma_rel: float) -> Snapshot:
        """The post-hoc EMA's average at a step, whether or not there is one."""
        name = f"{_step_name(step)}-sigma-{sigma_rel:g}.safetensors"
        return Snapshot(self.path / _POSTHOC_EMA / name, step, sigma_rel)

    def list_snapshots(self) -> list[Snapshot]:
        """The post-hoc EMA's averages there are, oldest first."""
        found = []
        for path in (self.path / _POSTHOC_EMA).glob("step-*.safetensors"):
            if named := re.fullmatch(r"step-([0-9]+)-sigma-([0-9.e-]+)", path.stem):
                found.append(Snapshot(path, int(named[1]), float(named[2])))
        return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.sigma_rel))

    @contextmanager
    def locked(self, option: str) -> Iterator[None]:
        """In the block, the folder is this process's to write; a `.lock` in it says so. A new folder goes if empty.

        Args:
            option: What names the folder, for the error.

        Raises:
            InputError: If another process has it, or it cannot be written to.
        """

        def refuse(holder: str) -> None:
            remedy = "wait for it, or name another folder"
            raise InputError(f"{holder} is training in it", argument=option, value=self.path, remedy=remedy)

        with ExitStack() as leaving:
            try:
                leaving.enter_context(alone_in(self.path, refuse))
            except OSError as error:
                raise InputError(
                    f"cannot be written to ({error.strerror})", argument=option, value=self.path, remedy="name another"
                ) from error
            yield


def _step_name(step: int) -> str:
    return f"step-{step:07d}"
