"""Models by name. A name is `<family>-<size>-<patch>`, for example `gspn-dit-xl-2`; families register themselves."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from gspn_dit.errors import InputError
from gspn_dit.models import FAMILIES

if TYPE_CHECKING:
    from gspn_dit.models.latent_model import LatentModel

PATCHES = (1, 2, 4, 8)
FAVOURITES = ("dit-xl-2", "gspn-xl-2", "gspn-dit-xl-2", "gspn-t", "gspn-grouped-t")  # for who names none by far

Model = TypeVar("Model", bound="type[LatentModel]")


@dataclass(frozen=True)
class Preset:
    """A named model: its class, and the constructor's arguments that the name stands for."""

    family: type[LatentModel]
    numbers: dict[str, Any]


_presets: dict[str, Preset] = {}


def register_model(family: str, sizes: Mapping[str, Mapping[str, Any]]) -> Callable[[Model], Model]:
    """Decorate a class of models: each of its sizes gets a name for each patch size.

    Args:
        family: First part of the names.
        sizes: Constructor arguments of each size, from small to large.
    """

    def register(model: Model) -> Model:
        for size, numbers in sizes.items():
            for patch in PATCHES:
                _presets[f"{family}-{size}-{patch}"] = Preset(model, {**numbers, "patch_size": patch})
        return model

    return register


def list_models(pattern: str = "*") -> list[str]:
    """The names that :func:`create_model` knows, family by family from small to large.

    Args:
        pattern: A shell's: `gspn-dit-*` gives that family's alone.
    """
    return [name for name in _registered() if fnmatchcase(name, pattern)]


class NoSuchOption(InputError):
    """A model has no option of that name."""


def create_model(name: str, **overrides: Any) -> LatentModel:
    """A new model by name, freshly initialised, in training mode on the default device.

    Args:
        name: One of :func:`list_models`.
        overrides: Constructor arguments in place of the preset's, for example `sample_size=8, num_classes=10`.

    Raises:
        InputError: An unknown name or override, or a value that the family cannot take.
    """
    preset = find_preset(name)
    check_options(name, preset.family, overrides)
    return preset.family(**{**preset.numbers, **overrides})


def find_preset(name: str) -> Preset:
    """The class of a named model and its numbers. Raises :class:`InputError` for an unknown name."""
    presets = _registered()
    if name not in presets:
        from gspn_dit.models.classifier import SIZES  # which imports this module

        if name in SIZES:
            raise InputError(
                "is a classifier",
                argument="name",
                value=name,
                wanted="a model of latents",
                remedy="`create_classifier` makes it",
            )
        raise no_such_model(name, presets)
    return presets[name]


def no_such_model(name: str, names: Collection[str]) -> InputError:
    """The error for a name that is none of those."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or [each for each in FAVOURITES if each in names]
    return InputError(
        "no such model",
        argument="name",
        value=name,
        remedy=f"did you mean {', '.join(close)}? `gspn-dit models` lists them all",
    )


def check_options(name: str, model: type[object], overrides: Mapping[str, Any]) -> None:
    """Raise :class:`NoSuchOption` for an override that the constructor of the model of that name does not take."""
    valid = inspect.signature(model).parameters
    for key, value in overrides.items():
        if key not in valid:
            raise NoSuchOption(
                f"{name} has no such option", argument=key, value=value, remedy=f"choose from {', '.join(valid)}"
            )


def find_class(class_name: str | None) -> type[LatentModel] | None:
    """The class that a saved model's config.json names by `_class_name`, or None if no family is of that name."""
    return next((p.family for p in _registered().values() if p.family.__name__ == class_name), None)


def _registered() -> dict[str, Preset]:
    """All presets, this package's families first, in the order of `FAMILIES`.

    A family is registered when its module is imported, in whatever order that is; this package's are imported here.
    """
    own = list(FAMILIES.values())
    for module in own:
        import_module(module)

    def place(named: tuple[str, Preset]) -> int:
        module = named[1].family.__module__
        return own.index(module) if module in own else len(own)

    return dict(sorted(_presets.items(), key=place))
