"""A folder of sampled images, one PNG each, drawn by any number of processes in as many runs as it takes.

    settings.json      what the images are a function of; written first
    labels.csv         file,label of every image there will be, and the class's name where it has one; of a model of
                       text metadata.jsonl in its place: each image's file_name and text, as captioned data has them
    000000.png …       image i, whole or not there

Image i depends on the settings and i alone. So a folder is the same however many processes drew it, and a run that was
cut goes on where it was.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from gspn_dit.data.captions import METADATA
from gspn_dit.diffusion import image_generator
from gspn_dit.errors import InputError
from gspn_dit.guidance import Guidance
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.progress import progress
from gspn_dit.storage.files import begin_or_continue, replacing
from gspn_dit.storage.pictures import save_image

SETTINGS_FILE = "settings.json"
IGNORED = ("model",)  # settings that may differ: the model's place may, since its weights' hash may not
# What stands for a setting that an older folder does not have.
ABSENT: dict[str, Any] = {"mixed_precision": "no", "guided_channels": None} | {
    name: value for name, value in vars(Guidance()).items() if name != "guidance_scale"
}


def image_file(i: int) -> str:
    """The name of image i."""
    return f"{i:06d}.png"


def begin(
    folder: Path,
    settings: dict[str, Any],
    subjects: Sequence[int] | Sequence[str],
    class_names: Sequence[str] | None = None,
) -> list[int]:
    """Begin a folder of images of class ids or of prompts, or continue it; as :func:`begin_images`."""
    if all(isinstance(subject, str) for subject in subjects):
        return begin_images(folder, settings, METADATA, ["text"], [[prompt] for prompt in subjects])
    names = ([class_names[int(label)]] if class_names else [] for label in subjects)
    rows = [[label, *name] for label, name in zip(subjects, names, strict=True)]
    return begin_images(folder, settings, "labels.csv", ["label", "name"][: 2 if class_names else 1], rows)


def begin_images(
    folder: Path,
    settings: dict[str, Any],
    table: str,
    columns: Sequence[str],
    rows: Sequence[Sequence],
    ignored: tuple[str, ...] = IGNORED,
) -> list[int]:
    """Begin a folder of images, or continue it, and return which are still to be drawn; one process does this.

    Args:
        folder: It is made if there is none.
        settings: What all images are a function of.
        table: The name of the file that lists them, a csv or a jsonl.
        columns: What it says of each image, beside its file.
        rows: That, of every image.
        ignored: Settings that may differ.

    Raises:
        InputError: If the folder was begun with other settings, or holds images that none of this began.
    """
    found = finished_images(folder)
    if found and not (folder / SETTINGS_FILE).exists():
        raise InputError(
            f"holds {len(found)} images without the {SETTINGS_FILE} that says what of",
            argument="out",
            value=str(folder),
            remedy="empty it or name another folder",
        )
    folder.mkdir(parents=True, exist_ok=True)
    begin_or_continue(folder / SETTINGS_FILE, settings, "out", ignored, ABSENT)
    for torn in folder.glob(".*.tmp"):
        torn.unlink()
    with replacing(folder / table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        if table.endswith(".jsonl"):
            named = ({"file_name": image_file(i), **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows))
            file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in named)
        else:
            csv.writer(file).writerow(["file", *columns])
            csv.writer(file).writerows([image_file(i), *row] for i, row in enumerate(rows))
    return [i for i in range(len(rows)) if i not in found]


def finished_images(folder: Path, below: float = math.inf) -> set[int]:
    """The numbers of the images that are in a folder, of those below a number."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = {int(name.removesuffix(".png")) for name in names if re.fullmatch(r"[0-9]{6,}\.png", name)}
    return {i for i in found if i < below}


def draw_missing(
    pipe: GSPNDiTPipeline,
    folder: Path,
    subjects: Sequence[int] | Sequence[str],
    missing: Sequence[int],
    processes: PartialState,
    *,
    seed: int,
    batch_size: int,
    **options: Any,
) -> None:
    """Draw this process's share of the missing images, and wait for the others'.

    The main process shows how far all of them are: it counts the folder's images now and then.

    Args:
        pipe: On this process's device.
        folder: The folder that :func:`begin` began.
        subjects: Class id or prompt of every image, missing or not.
        missing: Numbers of the images to draw, as :func:`begin` returned them.
        processes: The processes that share them.
        seed: Image i is a function of (seed, i).
        batch_size: Images at a time.
        options: Further arguments of the pipeline's call.
    """
    batch_size = min(batch_size, math.ceil(len(missing) / processes.num_processes) or 1)
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    shown = processes.is_main_process
    pipe.set_progress_bar_config(desc="steps", leave=False, position=1, disable=None if shown else True)
    done = len(subjects) - len(missing)
    with progress(
        total=len(subjects), initial=done, desc="sampling", unit="image", smoothing=0, disable=not shown
    ) as bar:
        next_look = 0.0
        for batch in batches[processes.process_index :: processes.num_processes]:
            asked: dict[str, Any] = {pipe.subject: [subjects[i] for i in batch]}
            (images,) = pipe(
                **asked,
                generator=[image_generator(seed, i) for i in batch],
                output_type="uint8",
                return_dict=False,
                **options,
            )
            for i, image in zip(batch, images.cpu(), strict=True):
                save_image(image, folder / image_file(i))
            if shown and (now := time.monotonic()) >= next_look:
                bar.update(len(finished_images(folder)) - bar.n)
                next_look = now + 100 * (time.monotonic() - now)  # at most a hundredth of the time goes into this
        processes.wait_for_everyone()
        bar.update(len(subjects) - bar.n)
