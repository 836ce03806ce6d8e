"""Class labels: a class per image, by its id or its name."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from gspn_dit.conditioning.condition import Condition
from gspn_dit.errors import InputError


class ClassLabels:
    """The condition {"class_labels": (B,) long}. The null class, of an image of no class, has the id `num_classes`.

    Args:
        num_classes: Classes, without the null class.
        class_names: Their names by id, or None where they have none.
    """

    names = ("class_labels",)

    def __init__(self, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        self.num_classes, self.class_names = num_classes, list(class_names or [])

    @property
    def null_class(self) -> int:
        """The id of no class."""
        return self.num_classes

    def read(self, given: int | str | Sequence[int | str]) -> Condition:
        """The condition of class ids or names, one or a list. Raises as :meth:`ids` does."""
        return {"class_labels": torch.tensor(self.ids([given] if isinstance(given, int | Integral | str) else given))}

    def null(self, count: int) -> Condition:
        """The condition of `count` images of no class."""
        return {"class_labels": torch.full((count,), self.null_class)}

    def drop(self, condition: Condition, mask: Tensor) -> Condition:
        """The condition with the null class where `mask` (B,) bool is true."""
        return {"class_labels": condition["class_labels"].masked_fill(mask, self.null_class)}

    def ids(self, class_labels: Sequence[int | str]) -> list[int]:
        """Class ids of ids or names. A number in a string that is no name is an id, unless all names are numbers.

        Raises :class:`InputError` for none, an id out of range, what is neither id nor name, or a name that no class
        has, with names close to it.
        """
        try:
            labels: list[Any] = list(class_labels)
        except TypeError:
            labels = [class_labels]  # no label, as is said below
        if not labels:
            raise InputError(argument="class_labels", value=[], wanted="one class id or name for each image")
        names = self.class_names
        numbers_are_names = bool(names) and all(map(_is_number, names))
        ids = []
        for label in labels:
            if isinstance(label, str) and (label in names or numbers_are_names or not _is_number(label)):
                if label not in names:
                    raise InputError(self._remedy_for_name(label), argument="class_labels", value=label)
                ids.append(names.index(label))
                continue
            try:
                number = int(label) if isinstance(label, str) else operator.index(label)
            except TypeError:
                raise InputError(
                    argument="class_labels", value=label, wanted="class ids, whole numbers, or names"
                ) from None
            if not 0 <= number < self.num_classes:
                raise InputError(
                    f"the model has classes 0 to {self.num_classes - 1}", argument="class_labels", value=number
                )
            ids.append(number)
        return ids

    def _remedy_for_name(self, label: str) -> str:
        names = self.class_names
        if not names:
            return f"the model's classes have no names; give ids 0 to {self.num_classes - 1}"
        if close := difflib.get_close_matches(label, names, n=3, cutoff=0.5):
            return f"no class has that name; did you mean {' or '.join(map(repr, close))}?"
        return f"no class has that name; the first of {len(names)} are {', '.join(map(repr, names[:3]))}"


def _is_number(label: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", label) is not None
