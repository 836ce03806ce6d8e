"""The models that `benchmarks.quality` compares, each from one word."""

from __future__ import annotations

from typing import Any

import yaml

from benchmarks.commands import QualityOptions
from benchmarks.quality_data import Task
from benchmarks.variants import OF_ANY_FAMILY, VARIANTS
from gspn_dit.errors import InputError
from gspn_dit.models import create_model
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.options import require


def model_config(spec: str, task: Task, options: QualityOptions) -> tuple[str, dict[str, Any], list[str]]:
    """What `create_model` makes a `family+key=value` of, at the width and depth of all, and the variants of it.

    Raises :class:`InputError` for a family, an option or a variant that there is not.
    """
    family, *words = spec.split("+")
    heads = max(1, options.width // 64)
    sizes: dict[str, Any] = {"width": options.width, "depth": options.depth}
    match family:
        case "dit":
            sizes["num_heads"] = heads
        case "gspn":  # an odd number of blocks; without the noise of dropped ones, which no other family has
            sizes |= {"depth": options.depth + 1 - options.depth % 2, "stochastic_depth": 0.0}
        case "gspn-dit":
            sizes["num_groups"] = heads
        case _:
            raise InputError(
                argument="models", value=spec, wanted="dit, gspn or gspn-dit, then options as in +mixer=linear"
            )
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(argument="models", value=spec, wanted=f"option=value after the plus, not {word!r}")
        sizes[key] = yaml.safe_load(value)
    variants = [variant for variant in sizes.pop("variant", "").split("&") if variant]
    for variant in variants:
        known = VARIANTS if family == "gspn-dit" else OF_ANY_FAMILY
        require(variant in known, "models", spec, f"variants out of {', '.join(known)}")
    return f"{family}-s-{task.patch_size}", sizes, variants


def make_model(spec: str, task: Task, options: QualityOptions) -> LatentModel:
    """The model of a word. Raises :class:`InputError`."""
    name, sizes, variants = model_config(spec, task, options)
    channels, *sample_size = task.latent_shape
    model = create_model(
        name,
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        num_classes=task.num_classes,
        **sizes,
    )
    for variant in variants:
        VARIANTS[variant](model)
    return model
