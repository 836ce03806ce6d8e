"""Whether a training's blocks are compiled.

Blocks, not the whole model: one is compiled and the others share it, so that the time does not grow with depth; FSDP
gathers a block at a time, and gradient checkpointing recomputes one; what is between blocks is a few operations.
"""

from __future__ import annotations

import torch
from accelerate.utils import gather_object

from gspn_dit.arguments import Switch
from gspn_dit.cuda_graphs import reason_of
from gspn_dit.errors import InputError
from gspn_dit.launches import Choice, Work, compile_pays


def choose_compile(
    asked: Switch, device: torch.device, work: Work, steps: int, graphed: bool, passes: int = 1
) -> Choice:
    """Whether to compile: what is asked for, or for `auto` where it pays and torch can. Every process calls this.

    Args:
        asked: `training.compile`.
        device: Of this process.
        work: Of a pass of this process.
        steps: How many are still to do.
        graphed: Whether they are a CUDA graph.
        passes: Passes in a step.

    Raises :class:`InputError` if compiling is asked for on a GPU, and torch cannot.
    """

    def choice(on: bool, reason: str) -> Choice:
        return Choice("compile", asked, on, reason, "blocks are compiled", "blocks are not compiled")

    if device.type != "cuda":
        return choice(asked is True, "" if asked != "auto" else f"on {device.type}")
    if asked is False:
        return choice(False, "")
    pays, found = compile_pays(work, steps, graphed, passes)
    if asked == "auto" and not pays:
        return choice(False, found)
    reasons = gather_object([why_no_compile(device)])  # one that cannot decides for all
    if (reason := next(filter(None, reasons), None)) is None:
        return choice(True, found if asked == "auto" else "")
    if asked is True:
        raise InputError(
            f"torch cannot compile here ({reason})", argument="training.compile", value=True, remedy="give auto"
        )
    return choice(False, f"torch cannot ({reason})")


def why_no_compile(device: torch.device) -> str | None:
    """Why torch cannot compile for a device, None if it can: it is asked to, for the smallest function.

    What a machine lacks (Triton, a C compiler, Python's headers, a folder to write to) shows nowhere else for sure.
    """
    try:
        torch.compile(_double, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        return reason_of(error)
    return None


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
