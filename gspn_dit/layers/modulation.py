"""DiT's last layer, whose norm has its shift and scale from the condition (arXiv 2212.09748, section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn

from gspn_dit.layers.fused import modulated_norm
from gspn_dit.layers.linear import linear


class FinalLayer(nn.Module):
    """DiT's last layer: a norm shifted and scaled by the condition, then a linear layer to the patch's pixels.

    (B, H, W, C) and the condition (B, 1, 1, C) to (B, H, W, patch_values). Both linear layers start at zero, so a new
    model predicts 0.
    """

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.linear = linear(width, patch_values, zero=True)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 2 * width, zero=True))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.linear(modulated_norm(x, self.adaLN_modulation(condition).unflatten(-1, (2, -1))))
