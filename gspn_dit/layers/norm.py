"""Norms that keep their input's dtype, under autocast too."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn_dit.ops.tail import EPSILON


def group_rms_norm(x: Tensor, num_groups: int) -> Tensor:
    """Each group of channels over its root mean square (arXiv 1910.07467), without weights, in x's dtype."""
    groups = x.unflatten(-1, (num_groups, -1))
    with without_autocast(x.device):
        return F.rms_norm(groups, groups.shape[-1:], eps=EPSILON).flatten(-2)


def without_autocast(device: torch.device) -> torch.autocast | nullcontext:
    """A block whose operations stay in their operands' dtype; on the meta device, which has no autocast, any block."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
