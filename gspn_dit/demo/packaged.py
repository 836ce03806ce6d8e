"""Small trained models that come with the package: VAEs and classifiers of digits and photos, diffusion models."""

import os
from pathlib import Path

_FOLDER = Path(__file__).parent / "weights"

PACKAGED = ("digits", "photos")  # what has a VAE, a classifier and a diffusion model here


def packaged(name: str) -> Path:
    """Path of a packaged weights file or folder, for example `digits` or `digits_classifier.safetensors`."""
    return _FOLDER / name


def absolute(name: str) -> str:
    """The absolute path of what is there by a name, so that it is found from any folder; any other name as it is."""
    return os.path.abspath(name) if name not in PACKAGED and os.path.exists(name) else name
