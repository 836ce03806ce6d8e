"""Norms that keep their input's dtype, under autocast too."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.ops.tail import EPSILON


def group_rms_norm(x: Tensor, num_groups: int) -> Tensor:
    """Each group of channels over its root mean square (arXiv 1910.07467), without weights, in x's dtype."""
    groups = x.unflatten(-1, (num_groups, -1))
    with without_autocast(x.device):
        return F.rms_norm(groups, groups.shape[-1:], eps=EPSILON).flatten(-2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each token, (B, H, W, C), in x's dtype: autocast on CUDA would make it float32."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class GlobalResponseNorm(nn.Module):
    """x + γ ⊙ x ⊙ n + β, n a channel's norm over the map by the mean of all channels' (ConvNeXt V2, arXiv 2301.00808).

    (B, H, W, C) to (B, H, W, C), in x's dtype; γ and β start at zero, so a new one is the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            dtype = torch.promote_types(x.dtype, torch.float32)  # sums of squares over a map overflow float16
            size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=dtype)  # (B, 1, 1, C)
            response = size / (size.mean(-1, keepdim=True) + EPSILON)
            factor = 1 + self.weight.to(dtype) * response
            return torch.addcmul(self.bias.to(x.dtype), x, factor.to(x.dtype))


def without_autocast(device: torch.device) -> torch.autocast | nullcontext:
    """A block whose operations stay in their operands' dtype; on the meta device, which has no autocast, any block."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
