"""What it takes a host to launch a network, and a GPU to compute it; and the choices that follow.

A small network is bound by its host: every operation is launched by Python, one after the other, while the GPU waits.
A CUDA graph (:mod:`gspn_dit.cuda_graphs`) launches them all at once; torch.compile makes fewer and shorter ones.

Choices are functions of sizes alone, not of a timing: two starts on one machine agree. The constants are of one
machine, an H100; on a slower GPU the work takes longer, and compiling saves more than is reckoned here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gspn_dit.arguments import CompileMode, Switch

if TYPE_CHECKING:
    from gspn_dit.models.latent_model import LatentModel

# Of gspn-dit-xl-2, not compiled, on an H100: a forward of 64 images of 256 pixels took 50.7 ms.
OPERATIONS_PER_SECOND = 2 * 357e6 * 64 * 256 / 50.7e-3
# Of the digits recipe there, all of it launches: 22 steps a second with 6 blocks; 500 samples, 800 forwards, in 7 s.
# Both hold more than launches, so they bound a block's from above.
LAUNCH_STEP_SECONDS = 1 / 22 / 6
LAUNCH_FORWARD_SECONDS = 7 / 800 / 6
# A graph's operations follow each other on the GPU: 767 of the 805 in a step of that recipe (benchmarks.launches). A
# kernel that has next to nothing to do takes about 2 µs there; this is not measured.
KERNEL_SECONDS = 2e-6
STEP_OPERATIONS = 767 / 6
COMPILED_SHARE = 1.215 / 1.684  # of a block's time, gspn-dit-xl-2 on an H100 (docs/performance.md)
# The repeated blocks of Flux, forward alone, compile in 9.6 s on an H100 (PyTorch's blog, "torch.compile and
# Diffusers"). With the backward pass three times that is reckoned with, and twice for what nobody has measured.
COMPILE_SECONDS = 2 * 3 * 9.6
TUNING = 5  # times as long, for some twenty kernels of each product are compiled and timed; not measured
CAPTURE_SECONDS = 0.3  # three forwards, a wait for the GPU, and the cache of memory emptied; not measured

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Whether something is done that changes only speed, and why.

    Args:
        option: The option that asks.
        asked: What was asked for.
        on: What that is here.
        reason: Why, in words.
        doing: The line that says it is done.
        leaving: The line that says it is not.
    """

    option: str
    asked: Switch
    on: bool
    reason: str
    doing: str
    leaving: str

    def say(self) -> None:
        """Say it as one line."""
        asked = str(self.asked).lower()
        why = f"{self.option} {asked}: {self.reason}" if self.reason else f"{self.option} {asked}"
        logger.info(f"{self.doing if self.on else self.leaving} ({why})")


@dataclass(frozen=True)
class Work:
    """The work of a network's blocks in one call, or in one step of a training.

    Args:
        blocks: How many.
        weights: Of all of them together.
        tokens: Of all images together.
        training: Whether it is a step, with the backward pass, rather than a forward alone.
    """

    blocks: int
    weights: int
    tokens: int
    training: bool = False

    @property
    def compute_seconds(self) -> float:
        """What a GPU needs if it never waits: every weight meets every token once, in the backward pass twice more."""
        return (3 if self.training else 1) * 2 * self.weights * self.tokens / OPERATIONS_PER_SECOND

    @property
    def launch_seconds(self) -> float:
        """What the host needs to launch it, one operation after the other."""
        return self.blocks * (LAUNCH_STEP_SECONDS if self.training else LAUNCH_FORWARD_SECONDS)

    @property
    def is_launch_bound(self) -> bool:
        """Whether a GPU would wait most of the time. The host's share is known from above only: twice, to be sure."""
        return self.launch_seconds > 2 * self.compute_seconds

    def step_seconds(self, graphed: bool) -> float:
        """What it takes as a whole: as a CUDA graph at least as many small kernels, else launches where they bind."""
        if graphed:
            return max(self.compute_seconds, self.blocks * STEP_OPERATIONS * KERNEL_SECONDS)
        return self.launch_seconds if self.is_launch_bound else self.compute_seconds


def work_of(model: LatentModel, latents: Sequence[int], training: bool = False) -> Work:
    """The work of a model of this package on latents (B, C, h, w)."""
    batch, _, height, width = latents
    tokens = batch * height * width // model.config.patch_size**2
    return Work(len(model.blocks), sum(p.numel() for p in model.blocks.parameters()), tokens, training)


def compile_pays(
    work: Work, steps: int, graphed: bool, passes: int = 1, mode: CompileMode = "default"
) -> tuple[bool, str]:
    """Whether steps that are still to do save more than compiling the blocks costs, and the two in words.

    Args:
        work: Of a step, or of one of its passes.
        steps: How many are left.
        graphed: Whether a step is a CUDA graph, so that the host's launches cost nothing any more.
        passes: Forward and backward passes in a step.
        mode: How blocks are compiled; `max-autotune` is reckoned to save no more and to take longer.
    """
    saved = (1 - COMPILED_SHARE) * passes * work.step_seconds(graphed) * steps
    takes = COMPILE_SECONDS * (TUNING if mode == "max-autotune" else 1)
    return saved > takes, f"{steps:,} steps save about {in_time(saved)}, compiling takes about {in_time(takes)}"


def calls_before_capture(work: Work) -> int | None:
    """Calls after which recording a graph of a forward pays; None where launches do not bind it.

    That is when the calls before have taken, in launches, as long as recording does. Nobody knows how many will come:
    who waits that long loses at most as much again as by knowing.
    """
    return math.ceil(CAPTURE_SECONDS / work.launch_seconds) if work.is_launch_bound else None


def in_time(seconds: float) -> str:
    """A duration in words, for a person: `2 s`, `3 min`, `5 h`."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
