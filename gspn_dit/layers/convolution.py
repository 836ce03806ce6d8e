"""Depthwise convolution of channels-last maps."""

from __future__ import annotations

from torch import Tensor, nn

from gspn_dit.errors import InputError, is_whole
from gspn_dit.layers.fused import depthwise_conv


class DepthwiseConv(nn.Conv2d):
    """One k × k filter per channel, zero padded to keep the map's size: (B, H, W, C) to (B, H, W, C).

    Raises:
        InputError: A kernel size that is not odd.
    """

    def __init__(self, width: int, kernel_size: int, bias: bool = True) -> None:
        if not is_whole(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(
                "give an odd number, so that the filter has a centre", argument="conv_kernel", value=kernel_size
            )
        super().__init__(width, width, kernel_size, padding=kernel_size // 2, groups=width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias)
