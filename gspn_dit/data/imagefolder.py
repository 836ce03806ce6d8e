"""Any folder of `root/class/*.jpg`, cropped to squares as ADM does."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gspn_dit.data.images import ImageDataset, UnreadableImage
from gspn_dit.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class ImageFolder(ImageDataset):
    """The images of `root/class/`, in the order of their sorted paths; a class is a sub-folder, in sorted order.

    Args:
        root: The folder of one split, for example `imagenet/train`.
        image_size: Side in pixels of the square the images are cropped to.

    Raises:
        InputError: If the root has no class folders, or a class folder has no images.
    """

    def __init__(self, root: str | os.PathLike, image_size: int) -> None:
        if image_size < 1:
            raise InputError(f"image_size={image_size}: wanted a positive number of pixels")
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not classes:
            raise InputError(f"source={str(root)!r}: no class folders in it; put the images into {root}/CLASS/")
        super().__init__(classes, image_size)
        self.paths: list[str] = []
        self.labels: list[int] = []
        for label, name in enumerate(classes):
            folder = os.path.join(root, name)
            files = sorted(file for file in os.listdir(folder) if _is_image(file))
            if not files:
                raise InputError(
                    f"source={str(root)!r}: class folder {folder} has no images ({' '.join(SUFFIXES)}); "
                    "remove it, fill it, or give the folder whose sub-folders are the classes"
                )
            self.paths += [os.path.join(folder, file) for file in files]
            self.labels += [label] * len(files)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                square = centre_crop(to_rgb(image), self.image_size)
        except Exception as error:  # Pillow's decoders raise a different class for each way a file can be broken
            raise UnreadableImage(path, " ".join(str(error).split()) or type(error).__name__) from error
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous(), self.labels[index]


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB of an image in any mode: transparency over white, 16-bit gray scaled to 8 bits."""
    if image.mode.startswith("I"):  # Pillow's own conversion clips everything above 255 to white
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (arXiv 2105.05233, and every published ImageNet figure since): a centred square of the short side.

    The image is halved with a box filter while its short side is at least twice the size, resized bicubically until the
    short side is the size, and cropped. Orientation tags are not applied, as ADM does not.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _is_image(file: str) -> bool:
    return file.lower().endswith(SUFFIXES) and not file.startswith(".")
