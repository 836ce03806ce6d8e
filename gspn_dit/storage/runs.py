"""A run's folder, as training leaves it: which checkpoints it holds."""

from __future__ import annotations

import os
import re
from pathlib import Path


def list_checkpoints(run: str | os.PathLike) -> list[Path]:
    """A run's checkpoint folders, `checkpoints/step-<digits>` with metadata.json and ema/ in them, oldest first."""
    return sorted(filter(_is_checkpoint, (Path(run) / "checkpoints").glob("step-*")), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def _is_checkpoint(path: Path) -> bool:
    named = re.fullmatch(r"step-[0-9]+", path.name)
    return bool(named) and (path / "metadata.json").is_file() and (path / "ema").is_dir()
