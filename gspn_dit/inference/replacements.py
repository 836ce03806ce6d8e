"""A folder to the layers that are saved in it, in the place of a UNet's self-attention."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError

from gspn_dit.errors import InputError, machine_fault
from gspn_dit.inference.loading import find_checkpoint
from gspn_dit.models.attention_replacement import AttentionReplacement


def load_replacement(path: str | os.PathLike) -> AttentionReplacement:
    """The replacement that a folder holds, or the averaged one of a run's newest checkpoint or of one checkpoint.

    Raises :class:`InputError`, of the argument `model`, if there is none, or its files cannot be read.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() and (checkpoint := find_checkpoint(path)) is not None:
        folder = checkpoint.ema
    try:
        return AttentionReplacement.from_pretrained(folder, use_safetensors=True)
    except (InputError, OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        if machine_fault(error) is not None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"it holds no replaced layers that can be read ({reason})", argument="model", value=str(path)
        ) from error
