"""Arguments that several rooms take: the rule of each stands here, once. Nothing here takes long to import."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral
from typing import Literal

from gspn_dit.errors import InputError, is_finite

MixedPrecision = Literal["auto", "no", "bf16", "fp16"]
"""What a network computes in: see :mod:`gspn_dit.precision`."""

Switch = bool | Literal["auto"]
"""Whether to do what only changes speed; `auto` leaves it to a rule (:mod:`gspn_dit.launches`)."""

CompileMode = Literal["default", "max-autotune"]
"""How blocks are compiled: see :mod:`gspn_dit.models.compiled_blocks`."""


def default_workers() -> int:
    """Processes that read data where nobody says how many: one for each core that this process may use, up to 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def check_switch(argument: str, value: object) -> None:
    """Raise :class:`InputError` for what is no :data:`Switch`."""
    if not (isinstance(value, bool) or value == "auto"):
        raise InputError(argument=argument, value=value, wanted="True, False or 'auto'")


def check_guidance(scale: float, interval: Sequence[float], group: str = "") -> None:
    """Raise :class:`InputError` for a guidance_scale or a guidance_interval, options of `group`, that cannot be."""
    if not is_finite(scale) or scale < 1:
        raise InputError(argument=f"{group}guidance_scale", value=scale, wanted="1 (none) or more")
    pair = isinstance(interval, Sequence) and len(interval) == 2 and all(map(is_finite, interval))
    if not pair or not 0 <= interval[0] < interval[1] <= 1:
        raise InputError(
            argument=f"{group}guidance_interval", value=interval, wanted="two numbers, 0 <= low < high <= 1"
        )


def check_num_inference_steps(
    n: int, group: str = "", *, least: int = 1, most: int | None = None, who: str = ""
) -> None:
    """Raise :class:`InputError` for a num_inference_steps, an option of `group`, that cannot be.

    Args:
        n: The number.
        group: What stands before the option's name, for example `sampling.`.
        least: The fewest steps.
        most: The most steps, if there is a limit.
        who: The scheduler that has these limits.
    """
    whole = isinstance(n, Integral) and not isinstance(n, bool)
    if not whole or n < least or (most is not None and n > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        problem, wanted = (f"{who} takes {limits}", None) if who else (None, limits)
        raise InputError(problem, argument=f"{group}num_inference_steps", value=n, wanted=wanted)
