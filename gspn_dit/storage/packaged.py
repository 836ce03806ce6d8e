"""Trained weights that come with the package, by their names: a table of paths, which are looked at when asked for."""

from __future__ import annotations

import os
from collections.abc import Container
from pathlib import Path

_WEIGHTS = Path(__file__).parents[1] / "demo" / "weights"

PACKAGED_MODELS = {"digits": _WEIGHTS / "digits", "photos": _WEIGHTS / "photos"}  # saved pipelines
PACKAGED_TEXT_TO_IMAGE: dict[str, Path] = {}  # saved pipelines of Stable Diffusion's architecture
PACKAGED_VAES = {name: _WEIGHTS / name / "vae" for name in ("digits", "photos", "scenes")}
PACKAGED_CLASSIFIERS = {
    "digits": _WEIGHTS / "digits_classifier.safetensors",
    "photos": _WEIGHTS / "photos_classifier.safetensors",
}
PACKAGED_IMAGE_CLASSIFIERS = {"fashion": _WEIGHTS / "fashion"}  # saved classifiers
PACKAGED_TEXT_ENCODERS = {"scenes": _WEIGHTS / "scenes" / "text_encoder"}  # saved CLIPTextModels
PACKAGED_TOKENIZERS = {"scenes": _WEIGHTS / "scenes" / "tokenizer"}  # of CLIP


def absolute(path: str, names: Container[str] = ()) -> str:
    """The absolute path of what is there, so that it is found from any folder; one of the names stays as it is."""
    return os.path.abspath(path) if path not in names and os.path.exists(path) else path
