"""Checkpoints of a run: written whole or not at all, the newest few kept.

runs/NAME/checkpoints/step-0001000/
    model.safetensors, optimizer.bin, random_states_*.pkl   accelerate's state
    ema/                                                     the averaged model, as from_pretrained reads it
    config.yaml, class_names.json                            what sampling needs to know
    metadata.json                                            step, images in the data, loss since the last log line
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_model
from torch.utils.data import Dataset

from gspn_dit.config import Config
from gspn_dit.errors import InputError
from gspn_dit.runs import list_checkpoints
from gspn_dit.training.ema import EMA


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


def check_resumable(checkpoint: Path, config: Config, source: Dataset) -> None:
    """Raise :class:`InputError` unless a configuration and its data continue the run that a checkpoint is of."""
    if config.resume == "no":
        raise InputError(
            f"output_dir={config.output_dir!r}: holds a run already; --resume auto continues it, or name another folder"
        )
    saved = Config.load(checkpoint / "config.yaml")
    for key in ("seed", "model.name", "model.overrides", "diffusion.objective", "data.source", "data.image_size",
                "data.vae", "training.batch_size"):  # fmt: skip
        before, now = _value(saved, key), _value(config, key)
        if before != now:
            raise InputError(f"{key}={now!r}: the run in {config.output_dir} has {before!r}; set it back")
    num_images = json.loads((checkpoint / "metadata.json").read_text())["num_images"]
    class_names = json.loads((checkpoint / "class_names.json").read_text())
    if (num_images, class_names) != (len(source), source.class_names):
        raise InputError(
            f"data.source={config.data.source!r}: it has {len(source)} images of {len(source.class_names)} classes, "
            f"and the run in {config.output_dir} began with {num_images} of {len(class_names)}; restore it"
        )


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, ema: EMA) -> dict[str, Any]:
    """Bring the accelerator's objects, the average and the random states back; returns the checkpoint's metadata."""
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
