"""What is learned (`create_objective`) and how it is sampled (`create_scheduler`, `denoise`)."""

from __future__ import annotations

from typing import Literal

from gspn_dit.diffusion.ddpm import DDPM
from gspn_dit.diffusion.flow import Flow
from gspn_dit.diffusion.objective import Batch, Objective
from gspn_dit.diffusion.sampling import denoise, image_generator
from gspn_dit.diffusion.schedulers import SAMPLERS, create_scheduler, objective_of
from gspn_dit.errors import InputError

__all__ = [
    "DDPM",
    "SAMPLERS",
    "Batch",
    "Flow",
    "Objective",
    "create_objective",
    "create_scheduler",
    "denoise",
    "image_generator",
    "objective_of",
]


def create_objective(name: str, *, time_sampling: Literal["uniform", "logit-normal"] = "uniform") -> DDPM | Flow:
    """The training objective `ddpm` (:class:`DDPM`) or `flow` (:class:`Flow`).

    Everything random comes to it as arguments, so that a run can be resumed exactly.

    Args:
        name: `ddpm` or `flow`.
        time_sampling: For `flow`, `uniform` or `logit-normal`; `ddpm` takes `uniform` only.

    Raises :class:`InputError` for anything else.
    """
    if name == "flow":
        return Flow(time_sampling)
    if name != "ddpm":
        raise InputError(argument="objective", value=name, wanted="'ddpm' or 'flow'")
    if time_sampling != "uniform":
        raise InputError(
            "the ddpm objective takes 'uniform'",
            argument="time_sampling",
            value=time_sampling,
            remedy="others need 'flow'",
        )
    return DDPM()
