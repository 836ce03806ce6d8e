"""Ways to the depthwise convolution of a block: torch's convolution in either memory format, and a sum of shifted maps.

`python -m benchmarks.depthwise [--device cuda] [--kernel-size 3] [--out FILE.md]` times them at 256 and 1024 pixels,
forward alone and forward with backward, after comparing their results, beside the bytes of the map read and written
once (backward: four times read, twice written) at the copy measured in the same run. The models have the first; the sum
of shifted maps, which torch.compile makes one kernel of, is what to try where that is slow.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.block_budget import median
from benchmarks.machine import machine
from gspn_dit.layers.convolution import DepthwiseConv
from gspn_dit.options import command, require
from gspn_dit.precision import choose_precision

PIXELS = (256, 1024)
BATCHES = {"cpu": 16, "cuda": 64}  # at 256 pixels
WIDTHS = {"cpu": 384, "cuda": 1152}


@dataclass
class Options:
    """What to time.

    Args:
        device: cpu or cuda.
        kernel_size: Side of the filter.
        dtype: float32 or bfloat16; by default the latter where the device has instructions for it.
        threads: Threads of the CPU.
        out: Also write the table to this Markdown file.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    kernel_size: int = 3
    dtype: Literal["float32", "bfloat16"] | None = None
    threads: int = 2
    out: str | None = None

    def __post_init__(self) -> None:
        auto = choose_precision("auto", torch.device(self.device)).dtype
        self.dtype = self.dtype or str(auto).removeprefix("torch.")
        require(self.threads >= 1, "threads", self.threads, "1 or more")


class ChannelsFirst(DepthwiseConv):
    """The same in the other memory format, with a copy before and after."""

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(x.permute(0, 3, 1, 2).contiguous(), self.weight, self.bias)
        return y.permute(0, 2, 3, 1).contiguous()


class ShiftedMaps(DepthwiseConv):
    """The same as a sum over the filter's taps, each a shifted map times a number a channel, summed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        side, (height, width) = self.kernel_size[0], x.shape[1:3]
        padded = F.pad(x, (0, 0, *2 * (side // 2,), *2 * (side // 2,))).float()
        taps = self.weight.float().flatten(1).unbind(-1)
        y = self.bias.float()
        for i, tap in enumerate(taps):
            row, column = divmod(i, side)
            y = y + tap * padded[:, row : row + height, column : column + width]
        return y.to(x.dtype)


def ways(options: Options, conv: DepthwiseConv) -> dict[str, torch.nn.Module]:
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
    copied = median(options.device, lambda: target.copy_(grad))
    conv = DepthwiseConv(width, options.kernel_size).to(dtype)
    lines, wanted = [], None
    for name, module in ways(options, conv).items():
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
        ms = [median(options.device, call) for call in (forward, both)]
        lines.append(
            f"| {pixels} px | {name} | {ms[0]:.3f} | {copied / ms[0]:.0%} | {ms[1]:.3f} | {3 * copied / ms[1]:.0%} |"
        )
    return lines


def main(options: Options) -> None:
    """Print the table."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lines = ["| image | way | forward, ms | of the copy | forward and backward, ms | of the copy |", "|---" * 6 + "|"]
    with torch.device(options.device):
        for pixels in PIXELS:
            lines += rows(options, pixels)
    lines += [
        "",
        f"{options.kernel_size} × {options.kernel_size}, {WIDTHS[options.device]} channels, {options.dtype}, "
        f"as many tokens at either size. {machine(options.device)}",
    ]
    print("\n".join(lines))
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    command(main, Options, prog="python -m benchmarks.depthwise")
