"""One picture of a few images, for the eye: the grid that training draws now and then, and an export's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspn_dit.diffusion import image_generator
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.storage.pictures import save_grid


def draw_grid(pipe: GSPNDiTPipeline, path: Path, *, count: int, seed: int, **options: Any) -> None:
    """Draw `count` images into one PNG, the classes spread over them; image i is a function of (seed, i).

    Args:
        pipe: On the device to draw on.
        path: The file; its folder is made.
        count: How many images.
        seed: Seed of their noise.
        options: Further arguments of the pipeline's call.
    """
    classes = pipe.transformer.config.num_classes
    labels = [i * classes // count if count < classes else i % classes for i in range(count)]
    generators = [image_generator(seed, i) for i in range(count)]
    (images,) = pipe(labels, generator=generators, output_type="uint8", return_dict=False, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, path, captions(pipe, labels))


def captions(pipe: GSPNDiTPipeline, labels: Sequence[int]) -> list[str] | None:
    """The names of images' classes, or their ids where there are no names; None where there is one class or none."""
    if pipe.transformer.config.num_classes == 1 or pipe.config.class_dropout == 1:
        return None
    names = pipe.config.class_names
    return [names[label] if names else str(label) for label in labels]
