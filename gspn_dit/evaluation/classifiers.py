"""Features to score images by, by their names: Inception's, or those of a small classifier of one data set.

A classifier is a class as :class:`Classifier` describes it. It gets its name by a line of the table below, by
`CLASSIFIERS.register`, or by an entry point of the group `gspn_dit.classifiers`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, Self

from gspn_dit.options import require
from gspn_dit.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

INCEPTION = "inception"
CLASSIFIERS = Registry(
    "gspn_dit.classifiers",
    {
        "digits": "gspn_dit.demo.classifier:DigitsClassifier",
        "photos": "gspn_dit.demo.classifier:PhotosClassifier",
    },
)
# Functions of pictures (each uint8 (3, H, W)) and as many captions: shares of the pictures of which something is true.
CAPTION_ACCURACIES = Registry("gspn_dit.caption_accuracies", {"scenes": "gspn_dit.demo.scene_reading:caption_accuracy"})


class Classifier(Protocol):
    """A small network that gives features of images, and logits of its classes from the features.

    Attributes:
        data: The data set.
        class_names: Its classes, by the logits' order.
        num_features: How many features there are.
        only_size: The only side of images it takes, in pixels, or None for any.
    """

    data: str
    class_names: Sequence[str]
    num_features: int
    only_size: int | None

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """The classifier of a file of weights, in eval mode."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of uint8 RGB images (B, 3, H, W)."""
        ...

    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, classes) of features."""
        ...


def check_features(key: str, name: str) -> None:
    """Raise :class:`InputError` about option `key` unless the name is `inception` or a classifier's."""
    *first, last = INCEPTION, *CLASSIFIERS
    require(name == INCEPTION or name in CLASSIFIERS, key, name, f"{', '.join(first)} or {last}")
