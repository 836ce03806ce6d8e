"""Random crops of the photographs in scikit-image's wheel, one class per photograph: no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gspn_dit.data.images import SPLITS, ImageDataset, check_split
from gspn_dit.errors import InputError
from gspn_dit.extras import require_extras

# Only files inside the wheel: skimage.data would download the others.
PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "cell": "cell.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "immunohistochemistry": "ihc.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
CROPS_PER_CLASS = {"train": 1000, "test": 100}
SMALLEST_CROP = 0.5  # of the photograph's short side: a crop still shows its subject
MAX_IMAGE_SIZE = 512


class Photos(ImageDataset):
    """Seeded random square crops, in position and scale, of 16 photographs and micrographs.

    Crop i is of photograph i mod 16; its side is uniform between half and all of the short side, its position uniform.
    Gray photographs are repeated over the 3 channels. At large image sizes small photographs (300 to 500 pixels) are
    enlarged. The test crops come from the same photographs by other draws: unseen crops, not unseen subjects.

    Args:
        split: `train` (1,000 crops per photograph) or `test` (100).
        image_size: Side of the images in pixels, at most 512.
        seed: Another seed gives other crops.

    Raises:
        InputError: If the split is unknown, the size is out of range, or scikit-image or one of its photographs is
            missing.
    """

    def __init__(self, split: str = "train", image_size: int = 256, seed: int = 0) -> None:
        check_split(split)
        if not 1 <= image_size <= MAX_IMAGE_SIZE:
            raise InputError(f"photos come at 1 to {MAX_IMAGE_SIZE} pixels", argument="image_size", value=image_size)
        super().__init__(list(PHOTOGRAPHS), image_size)
        self.split = split
        self.seed = seed
        self.photographs = [_read(name) for name in PHOTOGRAPHS.values()]

    def __len__(self) -> int:
        return len(self.photographs) * CROPS_PER_CLASS[self.split]

    def load(self, index: int) -> tuple[Tensor, int]:
        label = index % len(self.photographs)
        photograph = self.photographs[label]
        draw = np.random.Generator(np.random.PCG64([self.seed, SPLITS.index(self.split), index]))
        side = min(photograph.size) * draw.uniform(SMALLEST_CROP, 1)
        left, top = (draw.uniform(0, length - side) for length in photograph.size)
        crop = photograph.resize(
            (self.image_size, self.image_size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous(), label


def _read(name: str) -> Image.Image:
    require_extras("demo")
    import skimage

    path = Path(skimage.__file__).parent / "data" / name
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise InputError(
            f"scikit-image {skimage.__version__} has no {path}: reinstall it", argument="source", value="photos"
        ) from error
