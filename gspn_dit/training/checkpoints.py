"""Checkpoints of a run: written whole or not at all, checked before they are used, the newest few kept.

:mod:`gspn_dit.storage.run_folder` says which files a checkpoint has. Its metadata are the step, the number of images in
the data, the loss since the last log line, the mixed precision that was used, whether blocks were compiled, and every
file's size and SHA-256.

Every tensor is whole, however many processes trained and whether or not FSDP split the model over them, so that a run
continues on any number of processes, with or without FSDP. No random state is kept: all there is to draw is a function
of (seed, step) and the process.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gspn_dit.config import RunConfig
from gspn_dit.errors import InputError
from gspn_dit.launches import Choice
from gspn_dit.precision import Precision
from gspn_dit.storage.files import save_tensors, sha256
from gspn_dit.storage.run_folder import METADATA, Checkpoint, RunFolder
from gspn_dit.training.ema import EMA
from gspn_dit.training.sharding import copy_full, full_tensor, sharded_like
from gspn_dit.training.step_graph import StepGraph
from gspn_dit.training.task import Task

logger = logging.getLogger(__name__)


class CheckpointNotWritten(RuntimeError):
    """The disk did not take a checkpoint; the message names the reason and the last good checkpoint."""


class DiskWork:
    """What the main process writes while the others send it their parts; if it fails, all of them hear of it.

    Args:
        is_main: Whether this is the main process.

    Attributes:
        problem: What failed first, on the main process.
    """

    def __init__(self, is_main: bool) -> None:
        self.is_main = is_main
        self.problem: str | None = None

    def attempt(self, work: Callable[[], None]) -> None:
        """Do it on the main process, unless something failed before."""
        if self.is_main and self.problem is None:
            try:
                work()
            except (OSError, SafetensorError) as error:
                self.problem = " ".join(str(error).split())

    def settle(self, what: str, run: str | os.PathLike) -> None:
        """Raise :class:`CheckpointNotWritten` on every process if something failed; all of them call this."""
        (problem,) = broadcast_object_list([self.problem])
        if problem is not None:
            remedy = "Make room, then continue with --resume auto"
            raise CheckpointNotWritten(f"{what} could not be written ({problem}); {last_good(run)}. {remedy}")


@dataclass
class State:
    """All that the steps of a run change.

    Args:
        model: The model that is trained, without DDP's wrapper; FSDP may have split its parameters.
        wrapped: The same as accelerate wraps it, which is what a step calls.
        optimizer: Its AdamW, as accelerate wraps that.
        ema: The average that sampling uses.
        power_emas: The post-hoc EMA's averages, by relative width σ_rel.
        model_config: The model's config.json, from before FSDP gave it a class of its own.
        graph: The forward and backward pass as a CUDA graph, where that is how steps are done.
    """

    model: ModelMixin
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    power_emas: dict[float, EMA]
    model_config: str
    graph: StepGraph | None = None

    def files(self, checkpoint: Checkpoint) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        """What each file of a checkpoint holds, the optimiser's apart."""
        yield checkpoint.weights, dict(self.model.named_parameters())
        yield checkpoint.ema_weights, self.ema.tensors
        for sigma_rel, average in self.power_emas.items():
            yield checkpoint.power_ema(sigma_rel), average.tensors

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """AdamW's state by `<parameter>.<name>`; none before the first step."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }


def save_checkpoint(
    accelerator: Accelerator,
    config: RunConfig,
    state: State,
    class_names: list[str],
    metadata: dict[str, Any],
) -> Checkpoint:
    """Write a checkpoint under a temporary name, rename it, and remove all but the newest; every process calls this.

    Args:
        metadata: Its `step` names the folder; all of it comes back from :func:`load_checkpoint`.

    Raises:
        CheckpointNotWritten: On every process, if the disk does not take it. What was written of it is gone again, and
            the checkpoints there were are as they were.
    """
    run = RunFolder(Path(config.output_dir))
    folder, checkpoint = run.checkpoints, run.checkpoint(metadata["step"])
    temporary = Checkpoint(folder / f".{checkpoint.name}.tmp")
    if accelerator.scaler is not None:
        metadata = metadata | {"scaler": accelerator.scaler.state_dict()}
    writing = DiskWork(accelerator.is_main_process)

    def begin() -> None:
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.ema.mkdir(parents=True)

    def finish() -> None:
        temporary.ema_config.write_text(state.model_config)
        config.save(temporary.config)
        temporary.class_names.write_text(json.dumps(class_names))
        temporary.metadata.write_text(json.dumps(metadata | {"files": _sums(temporary.path)}))
        _flush(temporary.path)
        shutil.rmtree(checkpoint.path, ignore_errors=True)
        temporary.path.rename(checkpoint.path)
        for old in run.list_checkpoints()[: -_value(config, "training.keep_checkpoints")]:
            # first to a hidden name: a removal that is cut short leaves no half checkpoint
            hidden = old.path.rename(folder / f".{old.name}.old")
            shutil.rmtree(hidden, ignore_errors=True)  # what the disk holds back goes with the next one

    writing.attempt(begin)
    for path, tensors in [*state.files(temporary), (temporary.optimizer, state.optimizer_tensors())]:
        pieces = collect(tensors, keep=accelerator.is_main_process)
        writing.attempt(partial(save_tensors, pieces, path, {"format": "pt"}))
        del pieces
    writing.attempt(finish)
    if writing.problem is not None:
        shutil.rmtree(temporary.path, ignore_errors=True)
    writing.settle(f"the checkpoint of step {metadata['step']}", config.output_dir)
    return checkpoint


def load_checkpoint(accelerator: Accelerator, checkpoint: Checkpoint, state: State) -> dict[str, Any]:
    """Bring weights, optimiser and averages back; returns the checkpoint's metadata. Every process calls this."""
    for path, tensors in state.files(checkpoint):
        with safe_open(path, framework="pt") as file:
            for key, tensor in tensors.items():
                value = file.get_tensor(key)
                if value.shape != tensor.shape:
                    raise InputError(
                        f"{path}: {key} has shape {tuple(value.shape)}, the model's has {tuple(tensor.shape)}: it is "
                        "of another version",
                        remedy="train anew",
                    )
                copy_full(tensor, value)
    parameters = dict(state.model.named_parameters())
    with safe_open(checkpoint.optimizer, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (it is no dictionary)
            name, _, kind = key.rpartition(".")
            # A copy: the file's memory would keep it open, and NFS keeps a folder of which a file is open.
            parameter, value = parameters[name], file.get_tensor(key).clone()
            # AdamW's count of steps is one number, on the parameter's device; the rest is shaped as the parameter.
            value = sharded_like(value, parameter.detach()) if value.ndim else value.to(parameter.device)
            state.optimizer.state[parameter][kind] = value
    metadata = checkpoint.read_metadata()
    if accelerator.scaler is not None and "scaler" in metadata:
        accelerator.scaler.load_state_dict(metadata["scaler"])
    return metadata


def collect(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors whole, on the CPU, for the process that keeps them; every process calls this."""
    collected = {}
    for key, tensor in tensors.items():
        piece = full_tensor(tensor)
        if keep:
            collected[key] = piece.cpu().contiguous()
    return collected


def checkpoint_to_resume(task: Task, precision: Precision) -> Checkpoint | None:
    """The newest checkpoint of the run that is whole; None if it has none at all.

    One that is damaged is said to be, and set aside as `damaged-step-…`; so are changes of options and of precision.

    Raises:
        InputError: If the configuration or its data does not continue the run, or every checkpoint is damaged.
    """
    config = task.config
    checkpoints = RunFolder(Path(config.output_dir)).list_checkpoints()
    if not checkpoints:
        return None
    if config.resume == "no":
        raise InputError(
            "holds a run already",
            argument="output_dir",
            value=config.output_dir,
            remedy="--resume auto continues it, or name another folder",
        )
    damaged: dict[Checkpoint, str] = {}
    for checkpoint in reversed(checkpoints):
        if (problem := damage(checkpoint)) is None:
            break
        damaged[checkpoint] = problem
    else:
        raise InputError(
            f"no checkpoint of its {len(checkpoints)} is whole ({checkpoints[-1].name}: {damaged[checkpoints[-1]]})",
            argument="output_dir",
            value=config.output_dir,
            remedy="restore one, or name another folder",
        )
    check_resumable(checkpoint, task)
    say_changes(checkpoint, config, precision)
    for broken, problem in damaged.items():
        aside = broken.path.with_name(f"damaged-{broken.name}")
        shutil.rmtree(aside, ignore_errors=True)
        broken.path.rename(aside)
        logger.info(f"{broken} is damaged ({problem}): set aside as {aside.name}, continuing from {checkpoint.name}")
    return checkpoint


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files, or None if they are as they were written."""
    try:
        files = checkpoint.read_metadata()["files"]
        sizes = {name: (checkpoint.path / name).stat().st_size for name in files}
        for name, written in files.items():
            if sizes[name] != written["bytes"]:
                return f"{name} has {sizes[name]:,} of {written['bytes']:,} bytes"
        for name, found in _sums(checkpoint.path).items():
            if name in files and found["sha256"] != files[name]["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def check_resumable(checkpoint: Checkpoint, task: Task) -> None:
    """Raise :class:`InputError` unless a task continues the run that a checkpoint is of."""
    config, images = task.config, task.images
    try:
        saved = type(config).load(checkpoint.config)
    except InputError as error:
        raise InputError(
            f"the run in it was begun with what this command does not take ({error})",
            argument="output_dir",
            value=config.output_dir,
            remedy="name another folder, or go on with the command that began it",
        ) from error
    for key in task.same_at_resume:
        before, now = _value(saved, key), _value(config, key)
        if before != now:
            raise InputError(
                f"the run in {config.output_dir} has {before!r}", argument=key, value=now, remedy="set it back"
            )
    averaged = _value(saved, "training.sigma_rels")
    missing = [sigma for sigma in task.options.sigma_rels if sigma not in averaged]
    if missing:
        raise InputError(
            f"the run in {config.output_dir} has not averaged at {missing[0]:g} from its start, it has {averaged}",
            argument="training.posthoc_ema_sigma_rels",
            remedy="set them back (training.posthoc_ema_every=0 is none)",
        )
    task.check_data(checkpoint, saved)
    num_images = checkpoint.read_metadata()["num_images"]
    class_names = checkpoint.read_class_names()
    if (num_images, class_names) != (len(images), images.class_names):
        pairs = enumerate(zip(class_names, images.class_names, strict=False))
        others = (f" (class {i} was {before!r}, is {now!r})" for i, (before, now) in pairs if before != now)
        differ = next(others, "")
        raise InputError(
            (
                f"it has {len(images)} images of {len(images.class_names)} classes, and the run in "
                f"{config.output_dir} began with {num_images} of {len(class_names)}{differ}"
            ),
            argument="data.source",
            value=_value(config, "data.source"),
            remedy="restore it",
        )


UNSAID = ("resume", "output_dir", "model.init_from")  # the last has no effect: the run has weights of its own


def say_changes(checkpoint: Checkpoint, config: RunConfig, precision: Precision) -> None:
    """Say which options differ from those that a checkpoint was made with, and whether the precision does."""
    before, now = (flat_options(dataclasses.asdict(c)) for c in (type(config).load(checkpoint.config), config))
    changed = [key for key in now if key not in UNSAID and before.get(key) != now[key]]
    if changed:
        changes = ", ".join(f"{key} {before.get(key)!r} → {now[key]!r}" for key in changed)
        logger.info(f"changed since {checkpoint.name}: {changes}")
    metadata = checkpoint.read_metadata()
    computed_in = metadata.get("mixed_precision", before["training.mixed_precision"])
    if computed_in != precision.name:
        why = precision.reason if precision.asked == "auto" else "as asked"
        logger.info(f"changed since {checkpoint.name}: mixed_precision {computed_in} → {precision.name}: {why}")


def say_compile(checkpoint: Checkpoint, config: RunConfig, choice: Choice) -> None:
    """Say if blocks are compiled now and were not when a checkpoint was made, or the other way round."""
    of_before = _value(type(config).load(checkpoint.config), "training.compile") is True
    saved = checkpoint.read_metadata().get("compile", of_before)
    if saved != choice.on:
        words = {True: "on", False: "off"}
        why = choice.reason if choice.asked == "auto" else "as asked"
        logger.info(f"changed since {checkpoint.name}: compile {words[saved]} → {words[choice.on]}: {why}")


def flat_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= (
            {f"{key}.{name}": v for name, v in flat_options(value).items()} if isinstance(value, dict) else {key: value}
        )
    return flat


def last_good(run: str | os.PathLike) -> str:
    """What there is to go back to, in words."""
    newest = RunFolder(Path(run)).newest_checkpoint()
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _sums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a checkpoint but its metadata, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != METADATA)
    with ThreadPoolExecutor() as hashers:
        sums = hashers.map(sha256, paths)
        return {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": found}
            for path, found in zip(paths, sums, strict=True)
        }


def _flush(folder: Path) -> None:
    """The files reach the disk before the rename that makes them a checkpoint does."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
