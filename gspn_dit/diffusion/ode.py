"""The flow's ODE by dopri5, as SiT integrates it: steps as long as a tolerance allows (Dormand & Prince 1980)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from gspn_dit.diffusion.integrator import Generators, Integrator, Network, check_numbers
from gspn_dit.extras import require_extras


class FlowMatchDopri5Scheduler(Integrator):
    """dx/dt = v from t = 1 to t = 0 by torchdiffeq's dopri5.

    The tolerances alone say how many forwards that takes. An image's own errors choose its steps, so that it is the
    same in any batch: images go through the network one after the other.

    Args:
        num_train_timesteps: 1000, what the network is told at t = 1.
        rtol: Relative error that a step may make; SiT's by default, as the next.
        atol: Absolute error.

    Raises :class:`InputError` for what cannot be, or where torchdiffeq is missing.
    """

    order = 1
    chooses_times: ClassVar[bool] = True

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, rtol: float = 1e-3, atol: float = 1e-6) -> None:
        check_numbers(
            {"rtol": rtol, "atol": atol},
            rtol=(lambda x: x > 0, "a positive number"),
            atol=(lambda x: x > 0, "a positive number"),
        )
        require_extras("ode")
        self.set_timesteps(1)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Nothing is chosen before: the whole way is one step."""
        self.timesteps = torch.tensor([float(self.config.num_train_timesteps)], device=device)

    def integrate(
        self,
        network: Network,
        noise: Tensor,
        *,
        generator: Generators,
        after_step: Callable[[int, Tensor, Tensor], Tensor],
        progress: Callable[[Iterable], Iterable],
    ) -> Tensor:
        """As :meth:`Integrator.integrate`; `progress` counts images, and the whole way is the one step."""
        from torchdiffeq import odeint

        times = torch.tensor([1.0, 0.0], device=noise.device)
        scale, tolerances = self.config.num_train_timesteps, {"rtol": self.config.rtol, "atol": self.config.atol}
        images = []
        for i in progress(range(len(noise))):
            alone = network.image(i)

            def velocity(t: Tensor, x: Tensor, alone: Network = alone) -> Tensor:
                return alone(x, scale * min(max(float(t), 0.0), 1.0))

            images.append(odeint(velocity, noise[i : i + 1], times, method="dopri5", **tolerances)[-1])
        return after_step(0, self.timesteps[0], torch.cat(images))
