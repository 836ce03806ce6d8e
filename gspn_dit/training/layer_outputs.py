"""What the attention layers of a UNet put out, a teacher's and those in their place, and how far they are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LEAST_VARIANCE = 1e-6  # a layer whose output is all but constant is not divided by nothing


class LayerOutputs:
    """The outputs (B, N, C) of layers in the last forward passes that were listened to, by the layers' names.

    Args:
        teachers: The layers that were replaced.
        students: Those in their place, by the same names.
        alone: Whether students are only listened to: the teacher, asked the same, has its answer go on in the UNet, so
            that every student has the inputs that its teacher has, and one pass is enough for both.
    """

    def __init__(self, teachers: Mapping[str, nn.Module], students: Mapping[str, nn.Module], alone: bool) -> None:
        self.of_teachers: dict[str, Tensor] = {}
        self.of_students: dict[str, Tensor] = {}
        self._listening = False
        for name, student in students.items():
            if alone:
                teach = partial(self._hear_both, name, teachers[name])
                student.register_forward_hook(teach, with_kwargs=True)
            else:
                student.register_forward_hook(partial(self._hear, self.of_students, name))
                teachers[name].register_forward_hook(partial(self._hear, self.of_teachers, name))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In the block, layers are listened to; not when gradient checkpointing later computes them again."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What was heard of teachers and of students; it is not held on to."""
        taken = dict(self.of_teachers), dict(self.of_students)
        self.of_teachers.clear()
        self.of_students.clear()
        return taken

    def _hear(self, outputs: dict[str, Tensor], name: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._listening:
            outputs[name] = output

    def _hear_both(
        self, name: str, teacher: nn.Module, layer: nn.Module, inputs: Any, options: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not self._listening:
            return None  # the output stays the layer's own
        with torch.no_grad():
            taught = teacher(*inputs, **options)
        self.of_teachers[name], self.of_students[name] = taught, output
        return taught


def feature_errors(teachers: Mapping[str, Tensor], students: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean squared error (B,) float32 of each student's output (B, N, C) against its teacher's."""
    return {name: _mean_square(students[name].float() - taught.float()) for name, taught in teachers.items()}


def relative_errors(teachers: Mapping[str, Tensor], students: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As :func:`feature_errors`, over the variance of the teacher's output for that sample: 1 is a constant's error."""
    errors = feature_errors(teachers, students)
    return {
        name: error / teachers[name].float().flatten(1).var(1, correction=0).clamp_min(LEAST_VARIANCE)
        for name, error in errors.items()
    }


def mean_of(errors: Mapping[str, Tensor]) -> Tensor:
    """The mean over layers, (B,)."""
    return torch.stack(list(errors.values())).mean(0)


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)
