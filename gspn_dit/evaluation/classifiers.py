"""Features to score images by, by their names: Inception's, or those of a small classifier of one data set.

A classifier is a class with `load(path)`, `features(images)` and `classify(features)`, and with `data`, `class_names`,
`num_features` and `only_size` as :class:`gspn_dit.demo.classifier.Classifier` has them. It gets its name by a line of
the table below, by `CLASSIFIERS.register`, or by an entry point of the group `gspn_dit.classifiers`.
"""

from __future__ import annotations

from gspn_dit.options import require
from gspn_dit.registry import Registry

INCEPTION = "inception"
CLASSIFIERS = Registry(
    "gspn_dit.classifiers",
    {
        "digits": "gspn_dit.demo.classifier:DigitsClassifier",
        "photos": "gspn_dit.demo.classifier:PhotosClassifier",
    },
)


def check_features(key: str, name: str) -> None:
    """Raise :class:`InputError` about option `key` unless the name is `inception` or a classifier's."""
    *first, last = INCEPTION, *CLASSIFIERS
    require(name == INCEPTION or name in CLASSIFIERS, key, name, f"{', '.join(first)} or {last}")
