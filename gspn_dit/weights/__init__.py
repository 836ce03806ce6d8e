"""Small trained models that come with the package: the digits VAE, classifier and diffusion model."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def packaged(name: str) -> Path:
    """Path of a packaged weights file or folder, for example `digits` or `digits_classifier.safetensors`."""
    return _FOLDER / name
