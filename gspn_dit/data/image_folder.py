"""Any folder of `root/class/*.jpg`, at any depth, cropped to squares as ADM does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from gspn_dit.data.images import ImageDataset, UnreadableImage
from gspn_dit.errors import InputError, warn

# What counts as an image, in training and in evaluation: torchvision's suffixes, and others of formats Pillow decodes.
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".avif",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".jp2",
    ".j2k",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".pfm",
)

_UPRIGHT = {  # by the EXIF tag Orientation, which is 1 for an image that is upright as it is
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OVERSHOOT = 0.05  # how far out of its range a resampled float image may be
_LEAST_SHARE = 1 / 16  # of a range that values must reach to be told from those of a smaller one


class ImageFolder(ImageDataset):
    """The images of `root/class/` and its sub-folders, links followed, in torchvision's order; a class is a folder.

    Hidden files and folders are none. Files that are no images are counted, and a line says so.

    Args:
        root: The folder of one split, for example `imagenet/train`.
        image_size: Side in pixels of the square the images are cropped to.
        exif_orientation: Turn images as their EXIF orientation says; ADM, and so every published figure, does not.

    Raises:
        InputError: If the root has no class folders, a class folder has no images, or a folder cannot be read.
    """

    def __init__(self, root: str | os.PathLike[str], image_size: int, exif_orientation: bool = False) -> None:
        if image_size < 1:
            raise InputError(argument="image_size", value=image_size, wanted="a positive number of pixels")
        entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
        classes = sorted(entry.name for entry in entries if entry.is_dir())
        if not classes:
            raise InputError(
                "no class folders in it",
                argument="source",
                value=str(root),
                remedy=f"put the images into {root}/CLASS/",
            )
        super().__init__(classes, image_size)
        self.exif_orientation = exif_orientation
        self.paths: list[str] = []
        self.labels: list[int] = []
        left_out: list[str] = []
        is_flat = False
        for label, name in enumerate(classes):
            folder = os.path.join(root, name)
            files, others = find_images(folder)
            if not files:
                raise InputError(
                    f"class folder {folder} has no images ({' '.join(SUFFIXES)})",
                    argument="source",
                    value=str(root),
                    remedy="remove it, fill it, or give the folder whose sub-folders are the classes",
                )
            is_flat = is_flat or os.path.dirname(files[0]) == folder
            self.paths += files
            self.labels += [label] * len(files)
            left_out += others
        if beside := sum(_is_image(entry.name) for entry in entries if entry.is_file()):
            warn(f"{root}: {beside} images beside the class folders are left out; put them into a class folder")
        say_left_out(root, left_out)
        if not is_flat:
            warn(
                f"{root}: {len(classes)} classes ({_first(classes)}) whose images are all in sub-folders; "
                f"if those are the classes, give {os.path.join(root, classes[0])}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> tuple[Tensor, int]:
        return self.load_tagged(index)[:2]

    def load_tagged(self, index: int) -> tuple[Tensor, int, bool]:
        pixels, is_tagged = read_square(self.paths[index], self.image_size, self.exif_orientation)
        return pixels, self.labels[index], is_tagged


def read_square(path: str, image_size: int, exif_orientation: bool = False) -> tuple[Tensor, bool]:
    """A file's image as uint8 (3, image_size, image_size), and whether it has an EXIF orientation other than upright.

    Args:
        path: Of the file.
        image_size: Side in pixels of the square it is cropped to.
        exif_orientation: Turn it as its EXIF orientation says.

    Raises :class:`UnreadableImage`.
    """
    try:
        with Image.open(path) as file:
            file.load()  # which turns a TIFF by itself, and takes its tag away
            tag, image = _orientation(file), to_rgb(file)
            if tag is not None and exif_orientation:
                image = image.transpose(_UPRIGHT[tag])
            square = centre_crop(image, image_size)
    except Exception as error:  # Pillow's decoders raise a different class for each way a file can be broken
        raise UnreadableImage(path, " ".join(str(error).split()) or type(error).__name__) from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous(), tag is not None


def find_images(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Paths of a folder's images at any depth, in torchvision's order, and of its other files; hidden ones are neither.

    Links to folders are followed, but for those that lead back up.

    Raises :class:`InputError` if a folder cannot be read.
    """
    images: list[str] = []
    others: list[str] = []
    for root, files in sorted(_walk(os.fspath(folder))):
        for file in sorted(files):
            if not file.startswith("."):
                (images if _is_image(file) else others).append(os.path.join(root, file))
    return images, others


def say_left_out(folder: str | os.PathLike, others: Sequence[str]) -> None:
    """Warn of a folder's files that are not read, by their suffixes, if there are any."""
    if others:
        counts = Counter(Path(path).suffix.lower() or "no suffix" for path in others).most_common()
        listed = ", ".join(f"{suffix} ({count})" for suffix, count in counts[:8]) + (", …" if len(counts) > 8 else "")
        warn(f"{folder}: {len(others)} files left out: {listed}")


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder under one, itself among them, with the names of its files."""

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror})", remedy="see to its permissions"
        ) from error

    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        here = os.path.realpath(root)

        def leads_back(name: str, root: str = root, here: str = here) -> bool:
            path = os.path.join(root, name)
            return os.path.islink(path) and os.path.commonpath([here, target := os.path.realpath(path)]) == target

        folders[:] = [name for name in folders if not name.startswith(".") and not leads_back(name)]
        yield root, files


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB of an image in any mode: transparency over white, 16 bits scaled to 8.

    No file says what range its floats and 32-bit integers have. It is taken to be the smallest of 0 … 1 (for floats),
    0 … 255 and 0 … 65535 that holds all values of the image, floats up to a twentieth beyond it. Raises ValueError
    where none does, or the values leave room for doubt: they fill less than a sixteenth of the range.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        is_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        top = 65535 if is_16_bits else _range_of(values, image.mode)
        if (
            image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0
        ):  # white is zero, which Pillow sees to in 8 bits alone
            values = top - values
        image = Image.fromarray((values / (top / 255)).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _range_of(values: np.ndarray, mode: str) -> int:
    """The value that is white; see :func:`to_rgb`."""
    low, high, slack = float(values.min()), float(values.max()), _OVERSHOOT if mode == "F" else 0.0
    for top in (1, 255, 65535) if mode == "F" else (255, 65535):
        if low >= -slack * top and high <= (1 + slack) * top:
            if high >= _LEAST_SHARE * top or top == 1 or high <= 0:
                return top
            break
    raise ValueError(
        f"its values run from {low:g} to {high:g}, which is neither 0 … 1 nor 0 … 255 nor 0 … 65535: save it in 8 bits"
    )


def _orientation(image: Image.Image) -> int | None:
    """The EXIF tag of an image that is not upright as it is; None if it is, or has no tag that can be read."""
    try:
        tag = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of a damaged tag, which must not cost the image
        return None
    return tag if tag in _UPRIGHT else None


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (arXiv 2105.05233, and every published ImageNet figure since): a centred square of the short side.

    The image is halved with a box filter while its short side is at least twice the size, resized bicubically until the
    short side is the size, and cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_corner(width: int, height: int, size: int) -> tuple[int, int]:
    """Where (top, left) :func:`centre_crop` begins its square, in the resized image of a file of that size."""
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
    scale = size / min(width, height)
    return (round(height * scale) - size) // 2, (round(width * scale) - size) // 2


def _is_image(file: str) -> bool:
    return file.lower().endswith(SUFFIXES) and not file.startswith(".")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
