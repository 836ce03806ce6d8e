"""Guidance on tensors: a prediction, a worse one, and the guided one that :class:`~gspn_dit.guidance.Guidance` says."""

from __future__ import annotations

import torch
from torch import Tensor

from gspn_dit.diffusion.process import Process
from gspn_dit.guidance import Guidance


class Guider:
    """Combines predictions at one noise level after the other; of APG's momentum it keeps the running average.

    Args:
        guidance: What is to be done.
        process: What predictions are of.
    """

    def __init__(self, guidance: Guidance, process: Process) -> None:
        self.guidance, self.process = guidance, process
        self._average: Tensor | None = None

    def __call__(self, better: Tensor, worse: Tensor, weight: float, noisy: Tensor, timestep: float) -> Tensor:
        """The guided prediction, (B, C, h, w).

        Args:
            better: The model's prediction from `noisy` at `timestep`.
            worse: What it is led away from, of the same shape.
            weight: w, by how far.
            noisy: (B, C, h, w), what the model saw.
            timestep: On the scale 0…1000.
        """
        if self.guidance.projects:
            guided = better + (weight - 1) * self._projected(better, worse, noisy, timestep)
        else:
            guided = worse + weight * (better - worse)
        if share := self.guidance.guidance_rescale:
            guided = rescale(guided, better, share)
        return guided

    def _projected(self, better: Tensor, worse: Tensor, noisy: Tensor, timestep: float) -> Tensor:
        """APG's update, in units of the prediction (arXiv 2410.02416, algorithm 1); it acts on clean latents."""
        slope = self.process.slope(timestep) or -1e-6  # a clean map changes no more, and yet has a direction
        update = slope * (better - worse)
        if momentum := self.guidance.apg_momentum:
            self._average = update if self._average is None else update + momentum * self._average
            update = self._average
        if limit := self.guidance.apg_norm_threshold:
            norm = update.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            update = update * (limit / norm.clamp_min(limit))
        parallel, orthogonal = decompose(update, self.process.clean(noisy, better, timestep))
        return (orthogonal + self.guidance.apg_eta * parallel) / slope


def decompose(update: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of an update (B, C, h, w) parallel and orthogonal to another tensor, image by image."""
    axis = along.double().flatten(1)
    axis = axis / axis.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    flat = update.double().flatten(1)
    parallel = ((flat * axis).sum(1, keepdim=True) * axis).view_as(update)
    return parallel.to(update.dtype), (update.double() - parallel).to(update.dtype)


def rescale(guided: Tensor, better: Tensor, share: float) -> Tensor:
    """A guided prediction with a share φ of the standard deviation that the model's own has (2305.08891 eq. 15, 16).

    An image whose guided prediction is constant is left as it is.
    """
    wanted, found = (each.flatten(1).std(dim=1).view(-1, 1, 1, 1) for each in (better, guided))
    factor = torch.where(found > 0, wanted / found, 1.0)
    return share * (guided * factor) + (1 - share) * guided
