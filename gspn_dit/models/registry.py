"""The named sizes. A name is `<family>-<size>-<patch>`, for example `gspn-dit-xl-2`."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from gspn_dit.errors import InputError
from gspn_dit.models.dit import DiT
from gspn_dit.models.gspn import GSPN
from gspn_dit.models.gspn_dit import GSPNDiT
from gspn_dit.models.latent_model import LatentModel

FAMILIES: dict[str, type[LatentModel]] = {"dit": DiT, "gspn": GSPN, "gspn-dit": GSPNDiT}

# `ti` is for small images: the digits.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "dit": {
        "ti": {"width": 192, "depth": 6, "num_heads": 3},
        "s": {"width": 384, "depth": 12, "num_heads": 6},
        "b": {"width": 768, "depth": 12, "num_heads": 12},
        "l": {"width": 1024, "depth": 24, "num_heads": 16},
        "xl": {"width": 1152, "depth": 28, "num_heads": 16},
    },
    "gspn": {
        "ti": {"width": 192, "depth": 7},
        "s": {"width": 368, "depth": 25},
        "b": {"width": 900, "depth": 31},
        "l": {"width": 1200, "depth": 57},
        "xl": {"width": 1500, "depth": 57},
    },
    "gspn-dit": {
        "ti": {"width": 192, "depth": 6, "num_groups": 3},
        "s": {"width": 384, "depth": 12, "num_groups": 6},
        "b": {"width": 768, "depth": 12, "num_groups": 12},
        "l": {"width": 1024, "depth": 24, "num_groups": 16},
        "xl": {"width": 1152, "depth": 28, "num_groups": 18},
    },
}

PATCHES = (1, 2, 4, 8)

MODELS: dict[str, tuple[type[LatentModel], dict[str, Any]]] = {
    f"{family}-{size}-{patch}": (FAMILIES[family], {**numbers, "patch_size": patch})
    for family, sizes in SIZES.items()
    for size, numbers in sizes.items()
    for patch in PATCHES
}


def list_models() -> list[str]:
    """Every name that :func:`create_model` knows, family by family from small to large."""
    return list(MODELS)


def create_model(name: str, **overrides: Any) -> LatentModel:
    """A new model by name, freshly initialised, in training mode on the default device.

    Args:
        name: One of :func:`list_models`.
        overrides: Constructor arguments in place of the preset's, for example `sample_size=8, num_classes=10`.

    Raises:
        InputError: An unknown name or override, or a value that the family cannot take.
    """
    family, numbers = find_preset(name)
    valid = [parameter for parameter in inspect.signature(family.__init__).parameters if parameter != "self"]
    for key, value in overrides.items():
        if key not in valid:
            raise InputError(f"{key}={value!r}: {name} has no such option; choose from {', '.join(valid)}")
    return family(**{**numbers, **overrides})


def find_preset(name: str) -> tuple[type[LatentModel], dict[str, Any]]:
    """The class of a named model and its numbers. Raises :class:`InputError` for an unknown name."""
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5) or ["dit-xl-2", "gspn-xl-2", "gspn-dit-xl-2"]
        raise InputError(
            f"name={name!r}: no such model; did you mean {', '.join(close)}? `gspn-dit models` lists them all"
        )
    return MODELS[name]
