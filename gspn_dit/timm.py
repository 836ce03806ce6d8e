"""The classifiers in timm's registry: `import gspn_dit.timm`, then `timm.create_model("gspn_tiny")`.

Underscores and whole words are timm's way of naming: `gspn-grouped-t` is `gspn_grouped_tiny`. The models are those of
`gspn_dit.models.create_classifier`; timm adds its loading of weights and its feature extractors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gspn_dit.models.classifier import SIZES, GSPNClassifier, preparation

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError('timm is not installed; `pip install "gspn-dit[timm]"` brings it') from error

_WORDS = {"t": "tiny", "s": "small", "b": "base"}


def timm_name(name: str) -> str:
    """What timm calls one of :func:`gspn_dit.models.list_classifiers`."""
    family, _, size = name.rpartition("-")
    return f"{family}_{_WORDS.get(size, size)}".replace("-", "_")


def _default_cfg(numbers: dict[str, Any]) -> dict[str, Any]:
    classes = numbers.get("num_classes", 1000)
    return {**preparation(numbers.get("pretrained_cfg"), numbers.get("in_chans", 3), classes), "license": "apache-2.0"}


default_cfgs = generate_default_cfgs({timm_name(name): _default_cfg(numbers) for name, numbers in SIZES.items()})


def _entry(name: str) -> Callable[..., nn.Module]:
    numbers = {key: value for key, value in SIZES[name].items() if key != "pretrained_cfg"}  # timm has it already

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        stages = range(len({**numbers, **options}["widths"]))
        return build_model_with_cfg(
            GSPNClassifier,
            timm_name(name),
            pretrained,
            feature_cfg={"out_indices": tuple(stages), "feature_cls": "getter"},
            **{**numbers, **options},
        )

    create.__name__ = create.__qualname__ = timm_name(name)
    return create


for _name in SIZES:
    register_model(_entry(_name))
