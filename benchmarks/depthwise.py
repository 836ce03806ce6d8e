"""Ways to the depthwise convolution of a block: torch's convolution in either memory format, and a sum of shifted maps.

`python -m benchmarks.depthwise [--device cuda] [--kernel-size 3] [--out FILE.md]` times them at 256 and 1024 pixels,
forward alone and forward with backward, after comparing their results, beside the bytes of the map read and written
once (backward: four times read, twice written) at the copy measured in the same run. The models have the first; the sum
of shifted maps, which torch.compile makes one kernel of, is what to try where that is slow.
"""

from __future__ import annotations

from benchmarks.commands import DepthwiseOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("depthwise"))

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.result_files import write_report
from benchmarks.tables import header, row
from benchmarks.timing import steady_ms
from gspn_dit.layers.convolution import DepthwiseConv

CALLS = 20
PIXELS = (256, 1024)
BATCHES = {"cpu": 16, "cuda": 64}  # at 256 pixels
WIDTHS = {"cpu": 384, "cuda": 1152}


class ChannelsFirst(DepthwiseConv):
    """The same in the other memory format, with a copy before and after."""

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(x.permute(0, 3, 1, 2).contiguous(), self.weight, self.bias)
        return y.permute(0, 2, 3, 1).contiguous()


class ShiftedMaps(DepthwiseConv):
    """The same as a sum over the filter's taps, each a shifted map times a number per channel, summed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        side, (height, width) = self.kernel_size[0], x.shape[1:3]
        padded = F.pad(x, (0, 0, *2 * (side // 2,), *2 * (side // 2,))).float()
        taps = self.weight.float().flatten(1).unbind(-1)
        y = self.bias.float()
        for i, tap in enumerate(taps):
            row, column = divmod(i, side)
            y = y + tap * padded[:, row : row + height, column : column + width]
        return y.to(x.dtype)


def ways(conv: DepthwiseConv) -> dict[str, torch.nn.Module]:
    """Modules of the same weights by name."""
    made = {"convolution, channels last": conv}
    for name, kind in {"convolution, channels first": ChannelsFirst, "shifted maps, compiled": ShiftedMaps}.items():
        made[name] = copy.deepcopy(conv)
        made[name].__class__ = kind
    made["shifted maps, compiled"].compile(dynamic=False)
    return made


def rows(options: Options, pixels: int) -> list[str]:
    """A line of the table for every way at one size."""
    dtype, width, side = getattr(torch, options.dtype), WIDTHS[options.device], pixels // 16
    batch = max(1, BATCHES[options.device] * 256**2 // pixels**2)
    x = torch.randn(batch, side, side, width, dtype=dtype, requires_grad=True)
    grad, target = torch.randn_like(x), torch.empty_like(x)
    copied = steady_ms(options.device, lambda: target.copy_(grad), CALLS)
    conv = DepthwiseConv(width, options.kernel_size).to(dtype)
    lines, wanted = [], None
    for name, module in ways(conv).items():
        operands = [x, module.weight, module.bias]

        def forward(module: torch.nn.Module = module) -> Tensor:
            with torch.no_grad():
                return module(x)

        def both(module: torch.nn.Module = module, operands: list[Tensor] = operands) -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(x), operands, grad)

        results = [forward(), *both()]
        wanted = wanted or results
        for result, other in zip(results, wanted, strict=True):
            error = (result - other).float().abs().max() / other.float().abs().max()
            if not error < 0.02:
                raise RuntimeError(f"{name}: {error:.1%} off the convolution's")
        ms = [steady_ms(options.device, call, CALLS) for call in (forward, both)]
        shares = f"{copied / ms[0]:.0%}", f"{3 * copied / ms[1]:.0%}"
        lines.append(row([f"{pixels} px", name, f"{ms[0]:.3f}", shares[0], f"{ms[1]:.3f}", shares[1]]))
    return lines


def main(options: Options) -> None:
    """Print the table."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lines = header(["image", "way", "forward, ms", "of the copy", "forward and backward, ms", "of the copy"])
    with torch.device(options.device):
        for pixels in PIXELS:
            lines += rows(options, pixels)
    what = f"{options.kernel_size} × {options.kernel_size}, {WIDTHS[options.device]} channels, {options.dtype}"
    write_report([*lines, "", f"{what}, as many tokens at either size."], machine(options.device), options.out)
