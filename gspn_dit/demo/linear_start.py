"""First weights of a small AutoencoderKL with which it is a plain resampler from the first step on.

Encoding starts as averaging the colours of 4×4 pixels, decoding as interpolating them. From random weights minutes of
one core pass before a VAE is as good as that.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from gspn_dit.errors import not_none

# Lightness and two opponent colours, of about equal spread over photographs; rows by (red, green, blue) in [-1, 1].
COLOURS = torch.tensor([[0.7, 0.7, 0.7], [3.0, 0.0, -3.0], [-2.0, 4.0, -2.0]])
BOX = (
    torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) / 4
)  # the 2×2 pixels that diffusers halves to one
TENT = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
CENTRE = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
CONSTANT = 4.0
LOGVAR = -5.0


@torch.no_grad()
def start_linear(vae: AutoencoderKL) -> None:
    """Give a VAE of 3 levels, 4 groups and 4 latents such weights; channels that the resampling needs not stay random.

    Two things stand in the way of a linear network, the GroupNorm and the SiLU before each last convolution. A value x
    is carried through SiLU as SiLU(x) − SiLU(−x) = x. A channel of a constant beside them in each group makes the
    group's mean and deviation nearly the same for every image, and the norm's weight and bias undo those.
    """
    encoder, decoder = vae.encoder, vae.decoder
    for block in [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]:
        for resnet in block.resnets:
            nn.init.zeros_(resnet.conv2.weight)
            nn.init.zeros_(resnet.conv2.bias)
    for convolution, kernel in (
        (encoder.conv_in, CENTRE),
        (encoder.down_blocks[0].downsamplers[0].conv, BOX),
        (encoder.down_blocks[1].resnets[0].conv_shortcut, None),
        (encoder.down_blocks[1].downsamplers[0].conv, BOX),
        (decoder.conv_in, CENTRE),
        (decoder.up_blocks[0].upsamplers[0].conv, TENT),
        (decoder.up_blocks[1].resnets[0].conv_shortcut, None),
        (decoder.up_blocks[1].upsamplers[0].conv, TENT),
    ):
        for k in range(3):
            _row(convolution, k, {k: 1.0}, kernel)
    _last(encoder.down_blocks[2].resnets[0].conv_shortcut, encoder.conv_norm_out, encoder.conv_out, COLOURS)
    _last(decoder.up_blocks[2].resnets[0].conv_shortcut, decoder.conv_norm_out, decoder.conv_out, COLOURS.inverse())
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        for k in range(convolution.out_channels):
            _row(convolution, k, {k: 1.0})
    for k in range(vae.config.latent_channels, 2 * vae.config.latent_channels):
        _row(encoder.conv_out, k, {}, bias=LOGVAR)


def _row(
    convolution: nn.Conv2d, k: int, taps: dict[int, float], kernel: Tensor | None = None, bias: float = 0.0
) -> None:
    """Make output channel k the sum of input channels by their factors, each under the kernel; None is 1×1."""
    convolution.weight[k] = 0
    not_none(convolution.bias)[k] = bias
    for channel, factor in taps.items():
        convolution.weight[k, channel] = factor * (torch.ones(1, 1) if kernel is None else kernel)


def _last(shortcut: nn.Conv2d, norm: nn.GroupNorm, convolution: nn.Conv2d, mixing: Tensor) -> None:
    """Make outputs 0 to 2 of what follows the shortcut the mixing (3, 3) of its inputs 0 to 2."""
    width = norm.num_channels // norm.num_groups
    norm.bias.fill_(CONSTANT / width)
    norm.weight.fill_(CONSTANT * (1 / width - 1 / width**2) ** 0.5)
    for k in range(norm.num_groups):
        first = k * width
        _row(shortcut, first + 2, {}, bias=CONSTANT)
        if k < 3:
            row = dict(enumerate(mixing[k].tolist()))
            _row(shortcut, first, row)
            _row(shortcut, first + 1, {j: -factor for j, factor in row.items()})
            _row(convolution, k, {first: 1.0, first + 1: -1.0}, CENTRE)
