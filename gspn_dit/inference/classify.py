"""What `gspn-dit classify` does: pictures, and what a classifier takes them for."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("classify", prog="python -m gspn_dit.inference.classify")
    raise SystemExit

import os
from typing import TYPE_CHECKING

from gspn_dit.data.images import UnreadableImage
from gspn_dit.data.pictures import open_picture
from gspn_dit.data.preparation import Preparation
from gspn_dit.devices import choose_device
from gspn_dit.errors import InputError
from gspn_dit.inference.image_classifier import ImageClassifier, load_classifier

if TYPE_CHECKING:
    from gspn_dit.commands import ClassifyOptions


def main(options: ClassifyOptions) -> None:
    """Print the likeliest classes of each picture with their probabilities."""
    pictures = []
    for path in options.pictures:
        if not os.path.isfile(path):
            raise InputError("no such file", argument="pictures", value=path, wanted="a picture file")
        try:
            pictures.append(open_picture(path))
        except UnreadableImage as error:
            raise InputError(
                f"cannot be read as a picture ({error.reason})", argument="pictures", value=path
            ) from error
    model = load_classifier(options.model).to(choose_device(options.device))
    preparation = Preparation.of(model.pretrained_cfg).changed(options.image_size, None, None)
    classifier = ImageClassifier(model, preparation)
    for path, picture in zip(options.pictures, pictures, strict=True):
        best = classifier([picture])[0].topk(min(options.top, len(classifier.class_names)))
        named = [f"{classifier.class_names[int(i)]} {p:.1%}" for p, i in zip(best.values, best.indices, strict=True)]
        print(f"{path}: {', '.join(named)}")
