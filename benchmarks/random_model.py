"""Models at random weights, for measurements that need no trained ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gspn_dit.diffusion import create_objective
from gspn_dit.models import create_model
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.ops.registry import require_kernels


def random_model(name: str, device: str, *, dtype: torch.dtype | None = None, **overrides: Any) -> LatentModel:
    """A flow model with no weight left at zero.

    Args:
        name: Its preset.
        device: cpu or cuda.
        dtype: Of its weights, for a forward pass without gradients; None leaves it as it is trained.
        overrides: Options of `create_model`.

    Raises:
        InputError: Where the reference operator would be measured because the kernel is missing.
    """
    require_kernels(torch.device(device))
    with torch.device(device):
        model = create_model(name, out_channels=create_objective("flow").out_channels(4), **overrides)
        fill_zeros(model)
    return model if dtype is None else model.to(dtype).eval().requires_grad_(False)


def fill_zeros(model: nn.Module) -> None:
    """Random numbers for all weights that start at zero, with which adaLN-Zero makes every block the identity."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
