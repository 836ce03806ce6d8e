"""Guidance as data: how strongly a prediction is led away from a worse one, at which noise levels, and in which way.

Nothing here takes long to import: commands check their options by it. The arithmetic on tensors is in
:mod:`gspn_dit.diffusion.guiding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from gspn_dit.arguments import check_guidance
from gspn_dit.errors import InputError, is_finite

GuidanceSchedule = Literal["constant", "linear", "cosine", "power-cosine"]
"""How w - 1 depends on the noise level: see :meth:`Guidance.weight`."""

_SHAPES: dict[str, Callable[[float, float], float]] = {  # of the noise level, 1 at pure noise, and the power
    "constant": lambda level, power: 1.0,
    "linear": lambda level, power: 2 * (1 - level),
    "cosine": lambda level, power: 1 + math.cos(math.pi * level),
    "power-cosine": lambda level, power: (1 - math.cos(math.pi * (1 - level) ** power)) / 2,
}


@dataclass(frozen=True)
class Guidance:
    """How a prediction p of the model is led away from a worse one q: p' = q + w·(p - q), unless APG changes that.

    q is the prediction without a condition (classifier-free guidance, Ho & Salimans, arXiv 2207.12598), or a guide's
    with the same condition (autoguidance, Karras et al., arXiv 2406.02507).

    Args:
        guidance_scale: w; 1 is no guidance, and costs one forward a step.
        guidance_interval: Share (low, high) of the noise levels t/1000 at which it acts, 0 clean and 1 pure noise
            (Kynkäänniemi et al., arXiv 2404.07724).
        guidance_schedule: How w depends on the noise level: see :meth:`weight`.
        guidance_power: s of `power-cosine`.
        guidance_rescale: φ: the share by which p' is scaled to the standard deviation of p, image by image
            (Lin et al., arXiv 2305.08891, eq. 15 and 16); 0 leaves it.
        apg_eta: Of adaptive projected guidance (APG, Sadat et al., arXiv 2410.02416): how much is left of the part of
            the update that is parallel to the model's clean prediction; 1 is all.
        apg_norm_threshold: APG's r, the greatest norm of an update of the clean prediction; 0 for none.
        apg_momentum: APG's β, the weight of the updates before; negative leads away from them, 0 forgets them. Every
            forward that is guided is an update, also the second of a step of Heun's method.

    Raises :class:`InputError` for what cannot be.
    """

    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_schedule: GuidanceSchedule = "constant"
    guidance_power: float = 4.0
    guidance_rescale: float = 0.0
    apg_eta: float = 1.0
    apg_norm_threshold: float = 0.0
    apg_momentum: float = 0.0

    def __post_init__(self) -> None:
        check_guidance(self.guidance_scale, self.guidance_interval)
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        if self.guidance_schedule not in (names := get_args(GuidanceSchedule)):
            raise InputError(
                argument="guidance_schedule", value=self.guidance_schedule, wanted=f"one of {', '.join(names)}"
            )
        for name, fits, wanted in (
            ("guidance_power", lambda x: x > 0, "a number above 0"),
            ("guidance_rescale", lambda x: 0 <= x <= 1, "a share from 0 to 1"),
            ("apg_eta", lambda x: 0 <= x <= 1, "a share from 0 to 1"),
            ("apg_norm_threshold", lambda x: x >= 0, "0 (none) or more"),
            ("apg_momentum", lambda x: -1 < x < 1, "a number between -1 and 1"),
        ):
            value = getattr(self, name)
            if not is_finite(value) or not fits(value):
                raise InputError(argument=name, value=value, wanted=wanted)

    def weight(self, level: float) -> float:
        """w at a noise level l: 1 outside the interval, else 1 + (guidance_scale - 1)·f(l).

        f is 1 for `constant`, 2·(1 - l) for `linear` and 1 + cos(πl) for `cosine` (Wang et al., arXiv 2404.13040), and
        (1 - cos(π·(1 - l)^s))/2 for `power-cosine` (Gao et al., MDT, arXiv 2303.14389).
        """
        low, high = self.guidance_interval
        if not low <= level <= high:
            return 1.0
        return 1 + (self.guidance_scale - 1) * _SHAPES[self.guidance_schedule](level, self.guidance_power)

    @property
    def projects(self) -> bool:
        """Whether APG changes anything."""
        return (self.apg_eta, self.apg_norm_threshold, self.apg_momentum) != (1, 0, 0)
