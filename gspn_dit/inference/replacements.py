"""Layers in the place of a UNet's self-attention: read from a folder or a run, and exported from one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import yaml
from safetensors import SafetensorError

from gspn_dit.errors import InputError, machine_fault
from gspn_dit.inference.loading import find_checkpoint
from gspn_dit.inference.model_card import portable
from gspn_dit.inference.run_description import read_config
from gspn_dit.models.attention_replacement import AttentionReplacement
from gspn_dit.storage.files import new_folder, require_new
from gspn_dit.storage.run_folder import Checkpoint


def load_replacement(path: str | os.PathLike) -> AttentionReplacement:
    """The replacement that a folder holds, or the averaged one of a run's newest checkpoint or of one checkpoint.

    Raises :class:`InputError`, of the argument `model`, if there is none, or its files cannot be read.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() and (checkpoint := find_checkpoint(path)) is not None:
        folder = checkpoint.ema
    try:
        return AttentionReplacement.from_pretrained(folder, use_safetensors=True)
    except (InputError, OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        if machine_fault(error) is not None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"it holds no replaced layers that can be read ({reason})", argument="model", value=str(path)
        ) from error


def is_replacement(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of layers in the place of self-attention."""
    try:
        return json.loads(checkpoint.ema_config.read_text()).get("_class_name") == AttentionReplacement.__name__
    except (OSError, ValueError):  # who loads it says what is wrong
        return False


def export_replacement(checkpoint: Checkpoint, out: Path) -> None:
    """Write a checkpoint's averaged layers as a folder to share: config, weights, and a card that says how to mount it.

    It is what the checkpoint has in `ema/`, and the card.
    """
    replacement = load_replacement(checkpoint.ema)
    require_new(out, sum(p.numel() * p.element_size() for p in replacement.parameters()))
    with new_folder(out) as folder:
        replacement.save_pretrained(folder)
        (folder / "README.md").write_text(replacement_card(replacement, checkpoint))


def replacement_card(replacement: AttentionReplacement, checkpoint: Checkpoint) -> str:
    """What the layers are, how they are mounted, and how they were distilled, as Markdown."""
    config, base = portable(read_config(checkpoint.config)), replacement.config.base_model
    options, stage = config["replacement"], config["distillation"]["stage"]
    front = yaml.safe_dump(
        {"library_name": "gspn-dit", "tags": ["text-to-image", "line-scans"], "base_model": base}, sort_keys=False
    )
    parameters = sum(p.numel() for p in replacement.parameters())
    trained = ""
    if checkpoint.metadata.is_file():
        steps, images = checkpoint.read_metadata()["step"], config["training"]["batch_size"]
        trained = f" Distilled {stage} for {steps:,} steps of {images} pictures; averaged weights."
    return f"""---
{front}---

# {options["mixer"]} in the place of self-attention of {base}

{len(replacement.layer_names)} layers of the package `gspn-dit`, {parameters / 1e6:.1f} M parameters, that take the
place of self-attention (`attn1`) in the UNet of `{base}`. The base model is not in this folder.{trained}

## Use

```python
from diffusers import DiffusionPipeline
from gspn_dit import AttentionReplacement

pipe = DiffusionPipeline.from_pretrained("{base}")
AttentionReplacement.from_pretrained("this folder or repository").mount(pipe)
image = pipe("a red 3").images[0]
```

## Configuration

```yaml
{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}```
"""
