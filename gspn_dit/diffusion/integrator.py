"""What the samplers of this package are: schedulers, as diffusers saves and loads them, that do all the steps at once.

A scheduler of diffusers is told a prediction and does one step. These ask the network themselves: some before a step is
done, some at times that they choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Protocol, Self

import torch
from diffusers import ConfigMixin, SchedulerMixin
from torch import Tensor

from gspn_dit.errors import InputError, is_finite

Generators = torch.Generator | list[torch.Generator] | None


class Network(Protocol):
    """A network with its condition and guidance."""

    def __call__(self, noisy: Tensor, timestep: float) -> Tensor:
        """The prediction (B, C, h, w) from noisy latents x_t at a timestep on the scale 0…1000."""
        ...

    def image(self, i: int) -> Self:
        """The same for image i of the batch alone."""
        ...


class Integrator(SchedulerMixin, ConfigMixin):
    """A sampler that goes from noise to clean latents by itself.

    Attributes:
        timesteps: Where the network is asked first in each step, on the scale 0…1000.
        chooses_times: Whether it asks at times of its own choice, in no order, however many steps are wanted.
    """

    timesteps: Tensor
    chooses_times: ClassVar[bool] = False

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the steps; `timesteps`, on the scale 0…1000, is where the network is asked first in each."""
        raise NotImplementedError

    def integrate(
        self,
        network: Network,
        noise: Tensor,
        *,
        generator: Generators,
        after_step: Callable[[int, Tensor, Tensor], Tensor],
        progress: Callable[[Iterable], Iterable],
    ) -> Tensor:
        """Standard normal noise (B, C, h, w) to clean latents, image by image the same in any batch.

        Args:
            network: What predicts.
            noise: float32.
            generator: Of the noise on the way; with a list, image b's comes from the b-th alone.
            after_step: Called as after_step(step, timestep, latents) after each step; the latents it returns go on.
            progress: Wraps the iterable of steps.
        """
        raise NotImplementedError


def check_numbers(options: dict[str, Any], **rules: tuple[Callable[[Any], bool], str]) -> None:
    """Raise :class:`InputError` for a sampler's number that is none, or does not fit what is wanted, by its name."""
    for name, (fits, wanted) in rules.items():
        if not is_finite(value := options[name]) or not fits(value):
            raise InputError(argument=name, value=value, wanted=wanted)


def check_descending(argument: str, values: Sequence[float], most: float, least_is_open: bool = True) -> None:
    """Raise :class:`InputError` for levels that do not fall from at most `most` to above 0, or to 0 if not open."""
    found = list(values)
    falls = bool(found) and all(map(is_finite, found)) and all(b < a for a, b in pairwise(found))
    if not falls or found[0] > most or found[-1] < 0 or (least_is_open and found[-1] == 0):
        top = "" if most == math.inf else f" from at most {most:g}"
        end = "0, without it" if least_is_open else "0"
        raise InputError(argument=argument, value=values, wanted=f"numbers that fall{top} towards {end}")
