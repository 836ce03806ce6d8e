"""The forward and backward pass of a training step as one CUDA graph, for models that their launches bind.

A graph of what the step launches anyway, rather than torch.compile's `reduce-overhead`: recording takes a second where
compiling takes a minute, the kernels are the same, so that the losses are, and one recording holds the objective, the
embedders and the backward pass, not the model's forward alone. Compiled blocks may be in it.

What it costs: the step's activations and gradients keep their memory between steps, which a launch-bound step has
little of. Data, the exchange between processes, clipping, the optimiser and the averages stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from gspn_dit.arguments import Switch
from gspn_dit.config import LoopConfig
from gspn_dit.cuda_graphs import Recorder, reason_of
from gspn_dit.errors import InputError, warn
from gspn_dit.launches import Choice, Work

REHEARSALS = 3  # after which libraries have chosen their kernels, and a compiled block is compiled
TOLERANCE = 1e-2  # between a replay's loss and gradient and those of the same step launched as usual


class StepGraph:
    """The loss of a batch, and its gradients in the parameters' `.grad`, by replaying what was recorded at first.

    Gradients are written over, not added to: nobody need set them to zero, and nobody may let them go.

    A recording that fails, or finds another loss or gradient, is warned of; from there on, steps are launched as usual.

    Args:
        recorder: What records.
        parameters: Whose gradients the step finds.
    """

    def __init__(self, recorder: Recorder, parameters: list[nn.Parameter]) -> None:
        self._recorder, self._parameters = recorder, parameters
        self._places: dict[str, Any] | None = None
        self._loss: Tensor | None = None
        self._launch: Callable[[], None] = _nothing
        self.failed = False

    def gradients(self, batch: Mapping[str, Any], find: Callable[[Mapping[str, Any]], Tensor], seed: int) -> Tensor:
        """The loss of a batch; its gradients are in place.

        Args:
            batch: Of the shapes of the first.
            find: Does the same by launching every operation; the gradients are added to what there is.
            seed: Of what the model draws.
        """
        if self._loss is None and not self.failed:
            try:
                self._record(batch, find, seed)
            except RuntimeError as error:
                self.failed, self._loss, self._places, self._launch = True, None, None, _nothing
                warn(f"no CUDA graph of the training step ({reason_of(error)}); training goes on without")
        if self._loss is None:
            self._forget_gradients()
            torch.manual_seed(seed)
            return find(batch)
        self._fill(batch)
        torch.manual_seed(seed)
        self._launch()
        return self._loss

    def _record(self, batch: Mapping[str, Any], find: Callable[[Mapping[str, Any]], Tensor], seed: int) -> None:
        places = tree_map(torch.clone, dict(batch))
        self._places = places

        def work() -> Tensor:
            return find(places)

        for _ in range(REHEARSALS):
            self._forget_gradients()
            torch.manual_seed(seed)
            usual = torch.stack([self._recorder.rehearse(work).float(), self._norm()])
        self._forget_gradients()  # so that the recording makes its own, and writes them over at every replay
        torch.manual_seed(seed)
        loss, self._launch = self._recorder.record(work)
        torch.manual_seed(seed)
        self._launch()
        replayed = torch.stack([loss.float(), self._norm()])
        if usual.isfinite().all() and not torch.allclose(replayed, usual, rtol=TOLERANCE, atol=1e-6):
            raise RuntimeError(
                f"a replay's loss and gradient norm are {_in_words(replayed)}, the step's {_in_words(usual)}"
            )
        self._loss = loss

    def _fill(self, batch: Mapping[str, Any]) -> None:
        """Copy a batch to where the recording reads it."""
        places, given = tree_flatten(self._places)[0], tree_flatten(dict(batch))[0]
        if [p.shape for p in places] != [g.shape for g in given]:
            raise ValueError("a batch of other shapes than the recorded one")
        for place, tensor in zip(places, given, strict=True):
            place.copy_(tensor)

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])


def _nothing() -> None:
    """Before there is a recording, there is nothing to launch."""


def _in_words(loss_and_norm: Tensor) -> str:
    loss, norm = loss_and_norm.tolist()
    return f"{loss:.4g} and {norm:.4g}"


def choose_graph(asked: Switch, accelerator: Accelerator, options: LoopConfig, work: Work) -> Choice:
    """Whether a step is a CUDA graph: what is asked for, or for `auto` where launches bind it and nothing forbids it.

    Raises :class:`InputError` where one is asked for that cannot be.
    """

    def choice(on: bool, reason: str) -> Choice:
        return Choice(
            "cuda_graph", asked, on, reason, "training steps are replayed as a CUDA graph", "no CUDA graph of a step"
        )

    if asked is False:
        return choice(False, "")
    if (reason := why_no_graph(accelerator, options)) is not None:
        if asked is True:
            raise InputError(reason, argument="training.cuda_graph", value=True, remedy="give auto or false")
        return choice(False, reason)
    if asked is True:
        return choice(True, "")
    if not work.is_launch_bound:
        return choice(False, "the model's work outlasts its launches")
    return choice(True, "launches bind it")


def why_no_graph(accelerator: Any, options: LoopConfig) -> str | None:
    """Why a step cannot be a CUDA graph; None if it can."""
    if accelerator.device.type != "cuda":
        return f"on {accelerator.device.type}"
    if accelerator.num_processes > 1:
        return "processes exchange their gradients in the backward pass"
    if options.gradient_accumulation_steps > 1:
        return "gradients of several passes are accumulated"
    if accelerator.mixed_precision == "fp16":
        return "fp16 scales its loss anew at every step"
    if options.gradient_checkpointing:
        return "gradient checkpointing keeps random states on the host"
    return None
