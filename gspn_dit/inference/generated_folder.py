"""A folder of images of texts: as a folder of sampled images, with what stages are through.

settings.json              what the images are a function of, beside their prompts
metadata.jsonl             file_name and text of every image there will be, as captioned data has them
000000.png …               image i, whole or not there
.000001.stage0.safetensors the latents of an image that has stages to go; they go when it is there
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from gspn_dit.data.captions import METADATA
from gspn_dit.errors import InputError
from gspn_dit.inference.sample_folder import begin_images, finished_images, image_file
from gspn_dit.storage.files import replacing, save_tensors

IGNORED = ("model", "replacement")  # settings that may differ: the files' places may, since their hashes may not


def begin(folder: Path, settings: dict[str, Any], prompts: Sequence[str]) -> list[int]:
    """Begin a folder, or continue it, and return which images are still to be drawn; one process does this.

    Args:
        folder: It is made if there is none.
        settings: What images are a function of, beside their prompts.
        prompts: Of every image. More of them than before go on after those; of fewer, latents of the others go.

    Raises:
        InputError: If the folder was begun with other settings or prompts, or holds images that none of this began, or
            images of more prompts: nothing would say any more what of they are.
    """
    if beyond := [i for i in finished_images(folder) if i >= len(prompts)]:
        raise InputError(
            f"{folder} holds {image_file(min(beyond))} of another prompt",
            argument="prompt",
            remedy="give as many as before, or choose another --out",
        )
    if not (folder / METADATA).exists():
        if finished_images(folder) or kept_stages(folder):
            raise InputError(
                f"holds images without the {METADATA} that says what of",
                argument="out",
                value=str(folder),
                remedy="empty it or name another folder",
            )
    else:
        _check_prompts(folder / METADATA, prompts)
    missing = begin_images(folder, settings, METADATA, ["text"], [[prompt] for prompt in prompts], IGNORED)
    for i, stage in kept_stages(folder).items():
        if i not in missing:
            forget_latents(folder, i, before=stage + 1)
    return missing


def _check_prompts(path: Path, prompts: Sequence[str]) -> None:
    try:  # not as captions are read, which makes all space one
        before = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({error!r})", argument="out", value=str(path.parent), remedy="name another folder"
        ) from error
    for i, (old, new) in enumerate(zip(before, prompts, strict=False)):
        if old != new:
            raise InputError(
                f"{path.parent} was begun with {old!r} for {image_file(i)}",
                argument="prompt",
                value=new,
                remedy="give the same first, or choose another --out",
            )


def keep_latents(folder: Path, i: int, stage: int, latents: Tensor) -> None:
    """Keep the latents (C, h, w) of image i after a stage, in the place of an earlier stage's."""
    with replacing(_latents_file(folder, i, stage)) as temporary:
        save_tensors({"latents": latents}, temporary)
    forget_latents(folder, i, before=stage)


def kept_stages(folder: Path) -> dict[int, int]:
    """The last stage that is through, of every image whose latents are kept."""
    kept: dict[int, int] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if name := re.fullmatch(r"\.([0-9]{6,})\.stage([0-9]+)\.safetensors", path.name):
            kept[int(name[1])] = max(kept.get(int(name[1]), 0), int(name[2]))
    return kept


def load_latents(folder: Path, i: int, stage: int) -> Tensor:
    """What :func:`keep_latents` kept."""
    return load_file(_latents_file(folder, i, stage))["latents"]


def forget_latents(folder: Path, i: int, before: int) -> None:
    """Remove the latents of image i that stages before one left."""
    for stage in range(before):
        _latents_file(folder, i, stage).unlink(missing_ok=True)


def _latents_file(folder: Path, i: int, stage: int) -> Path:
    return folder / f".{image_file(i).removesuffix('.png')}.stage{stage}.safetensors"
