"""One picture of a few images, for the eye: the grid that training draws now and then, and an export's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspn_dit.diffusion import image_generator
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.storage.pictures import save_grid


def draw_grid(pipe: GSPNDiTPipeline, path: Path, *, count: int, seed: int, **options: Any) -> None:
    """Draw `count` images into one PNG, the classes spread over them, or the pipeline's own prompts in turn.

    Image i is a function of (seed, i).

    Args:
        pipe: On the device to draw on.
        path: The file; its folder is made.
        count: How many images.
        seed: Seed of their noise.
        options: Further arguments of the pipeline's call.
    """
    subjects = spread(pipe, count)
    generators = [image_generator(seed, i) for i in range(count)]
    asked: dict[str, Any] = {pipe.subject: subjects}
    (images,) = pipe(**asked, generator=generators, output_type="uint8", return_dict=False, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, path, captions(pipe, subjects))


def spread(pipe: GSPNDiTPipeline, count: int) -> list[int] | list[str]:
    """What so many images of a grid show: class ids, or prompts."""
    if pipe.subject == "prompt":
        prompts = pipe.config.prompts or [""]
        return [prompts[i % len(prompts)] for i in range(count)]
    classes = pipe.transformer.config.num_classes
    return [i * classes // count if count < classes else i % classes for i in range(count)]


def captions(pipe: GSPNDiTPipeline, subjects: Sequence[int] | Sequence[str]) -> list[str] | None:
    """What is written over images: their prompts; or the names of their classes, or ids where there are no names.

    None where there is one class or none.
    """
    if pipe.subject == "prompt":
        return list(map(str, subjects))
    if pipe.transformer.config.num_classes == 1 or pipe.config.class_dropout == 1:
        return None
    names = pipe.config.class_names
    return [names[int(label)] if names else str(label) for label in subjects]
