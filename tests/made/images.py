"""Folders of made pictures."""

import numpy as np
from PIL import Image


def write_images(folder, count=3, size=(32, 32), labels=None):
    """PNGs of noise, 0.png, 1.png, …; the images as uint8 (N, H, W, 3)."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(count).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    if labels is not None:
        (folder / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{k}\n" for i, k in enumerate(labels)))
    return pixels
