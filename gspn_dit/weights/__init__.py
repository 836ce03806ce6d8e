"""Small trained models that come with the package: VAEs and classifiers of digits and photos, diffusion models."""

from pathlib import Path

_FOLDER = Path(__file__).parent

PACKAGED = ("digits", "photos")  # what has a VAE, a classifier and a diffusion model here


def packaged(name: str) -> Path:
    """Path of a packaged weights file or folder, for example `digits` or `digits_classifier.safetensors`."""
    return _FOLDER / name
