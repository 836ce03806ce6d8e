"""Checkpoints of a run: written whole or not at all, the newest few kept.

runs/NAME/checkpoints/step-0001000/
    model.safetensors, optimizer.bin, random_states_*.pkl   accelerate's state
    ema/                                                     the averaged model, as from_pretrained reads it
    config.yaml, class_names.json                            what sampling needs to know
    metadata.json                                            step, and the loss since the last line of metrics.csv
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_model

from gspn_dit.config import Config
from gspn_dit.errors import InputError
from gspn_dit.training.ema import EMA


def list_checkpoints(run: str | os.PathLike) -> list[Path]:
    """A run's checkpoint folders, oldest first."""
    found = [path for path in (Path(run) / "checkpoints").glob("step-*") if (path / "metadata.json").is_file()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(
    accelerator: Accelerator, config: Config, ema: EMA, class_names: list[str], metadata: dict[str, Any]
) -> Path:
    """Write a checkpoint under a temporary name, rename it, and remove all but the newest; every process calls this.

    Args:
        metadata: Its `step` names the folder; all of it comes back from :func:`load_checkpoint`.
    """
    folder = Path(config.output_dir) / "checkpoints"
    checkpoint = folder / f"step-{metadata['step']:07d}"
    temporary = folder / f".{checkpoint.name}.tmp"
    if accelerator.is_main_process:
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(temporary)
    if accelerator.is_main_process:
        ema.model.save_pretrained(temporary / "ema")
        config.save(temporary / "config.yaml")
        (temporary / "class_names.json").write_text(json.dumps(class_names))
        (temporary / "metadata.json").write_text(json.dumps(metadata))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _flush(temporary)
        shutil.rmtree(checkpoint, ignore_errors=True)
        temporary.rename(checkpoint)
        for old in list_checkpoints(config.output_dir)[: -config.training.keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return checkpoint


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, config: Config, ema: EMA) -> dict[str, Any]:
    """Bring the accelerator's objects, the average and the random states back; returns the checkpoint's metadata.

    Raises:
        InputError: If the checkpoint is of another model, objective, seed or data.
    """
    saved = Config.load(checkpoint / "config.yaml")
    for key in ("seed", "model.name", "model.overrides", "diffusion.objective", "data.source", "training.batch_size"):
        before, now = _value(saved, key), _value(config, key)
        if before != now:
            raise InputError(
                f"{key}={now!r}: the run in {config.output_dir} has {before!r}; set it back or start afresh"
            )
    accelerator.load_state(checkpoint)
    load_model(ema.model, checkpoint / "ema" / "diffusion_pytorch_model.safetensors", device=str(accelerator.device))
    return json.loads((checkpoint / "metadata.json").read_text())


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _flush(folder: Path) -> None:
    """The files reach the disk before the rename that makes them a checkpoint does."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
