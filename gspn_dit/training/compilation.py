"""Whether a training's blocks are compiled.

Blocks, not the whole model: one is compiled and the others share it, so that the time does not grow with depth; FSDP
gathers a block at a time, and gradient checkpointing recomputes one; what is between blocks is a few operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from accelerate.utils import gather_object

from gspn_dit.arguments import CompileMode, Switch
from gspn_dit.cuda_graphs import reason_of
from gspn_dit.errors import InputError, warn
from gspn_dit.launches import Choice, Work, compile_pays
from gspn_dit.models.compiled_blocks import compile_blocks
from gspn_dit.models.latent_model import LatentModel

# Of a model of the same kind as another: the fewest blocks that every family takes, the last one with global scans.
SMALLEST = {"depth": 3, "global_layers": 1}


def choose_compile(
    asked: Switch,
    device: torch.device,
    work: Work,
    steps: int,
    graphed: bool,
    passes: int = 1,
    rehearse: Callable[[], None] | None = None,
    mode: CompileMode = "default",
) -> Choice:
    """Whether to compile: what is asked for, or for `auto` where it pays and torch can. Every process calls this.

    Args:
        asked: `training.compile`.
        device: Of this process.
        work: Of a pass of this process.
        steps: How many are still to do.
        graphed: Whether they are a CUDA graph.
        passes: Passes in a step.
        rehearse: Compiles and runs blocks of the model, as :func:`rehearse_blocks`; for `auto`, which goes on without
            where that fails, with a warning.
        mode: `training.compile_mode`.

    Raises :class:`InputError` if compiling is asked for on a GPU, and torch cannot.
    """

    def choice(on: bool, reason: str) -> Choice:
        doing = "blocks are compiled" + (f" with {mode}" if mode != "default" else "")
        return Choice("compile", asked, on, reason, doing, "blocks are not compiled")

    if device.type != "cuda":
        return choice(asked is True, "" if asked != "auto" else f"on {device.type}")
    if asked is False:
        return choice(False, "")
    pays, found = compile_pays(work, steps, graphed, passes, mode)
    if asked == "auto" and not pays:
        return choice(False, found)
    reason = _first_of_all(why_no_compile(device))
    if reason is None and asked == "auto" and rehearse is not None:
        reason = _first_of_all(failure_of(rehearse))
        if reason is not None:
            warn(f"torch cannot compile the model's blocks ({reason}); training goes on without")
    if reason is None:
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
    return failure_of(lambda: torch.compile(_double, dynamic=False)(torch.ones(8, device=device)))


def failure_of(work: Callable[[], object]) -> str | None:
    """Why some work fails, in one line; None if it does not. Of a compiler's error it is what went wrong inside."""
    try:
        work()
    except Exception as error:  # Inductor, Triton and ptxas each have errors of their own
        return reason_of(getattr(error, "inner_exception", None) or error)
    return None


def rehearse_blocks(
    model: LatentModel,
    latents: Sequence[int],
    autocast: Callable[[], AbstractContextManager[object]],
    mode: CompileMode = "default",
) -> None:
    """Compile new blocks of a model's kind and width, SMALLEST["depth"], and run them forward and backward once.

    What Inductor makes of a block depends on its map and its precision, so both are those of the training.

    Args:
        model: What will be trained; it stays as it is.
        latents: The shape (B, C, h, w) of what it will be called with.
        autocast: Makes the context in which it will be called.
        mode: How its blocks will be compiled.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        smaller = {name: number for name, number in SMALLEST.items() if name in model.config}
        small = type(model).from_config({**model.config, **smaller}).to(device).train()
        compile_blocks(small, mode)
        x, timesteps = torch.zeros(*latents, device=device), torch.zeros(latents[0], device=device)
        with autocast():
            y = small(x, timesteps, **small.example_condition(latents[0]))
        y.float().sum().backward()


def _first_of_all(reason: str | None) -> str | None:
    """The first reason of all processes: one that cannot compile decides for all."""
    return next(filter(None, gather_object([reason])), None)


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
