"""What a call of Stable Diffusion's UNets takes of memory by size, computed on the meta device.

`python -m benchmarks.unet_memory [--out FILE.md]` runs the UNets of SD 1.5 and SD-XL without weights or numbers, with
every self-attention replaced by line scans, and counts the tensors that live at the peak (`live_tensors.py`): as they
are, and with each of what `gspn-dit generate --memory on` does. No GPU and no time are in it.
"""

from __future__ import annotations

from benchmarks.commands import UNetMemoryOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("unet_memory"))

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack

import torch
from diffusers import UNet2DConditionModel

from benchmarks.live_tensors import FlashAttention, LiveTensors, park, unpark
from benchmarks.machine import machine
from benchmarks.result_files import write_report
from benchmarks.stable_diffusion import inputs_on_meta, unet_on_meta
from benchmarks.tables import header, row
from gspn_dit import replace_self_attention
from gspn_dit.inference.unet_memory import activations_in_place, feed_forwards_in_slices, skips_kept

LIMIT = 2**31 - 1
Block = Callable[[UNet2DConditionModel], AbstractContextManager]
SAVINGS: dict[str, tuple[int, list[Block]]] = {  # images in a call, and what is around it; each has those before it
    "as it is": (2, []),
    "guidance in slices": (1, []),
    "feed-forwards in slices": (1, [feed_forwards_in_slices]),
    "activations in place": (1, [feed_forwards_in_slices, activations_in_place]),
    "skips on the CPU": (
        1,
        [feed_forwards_in_slices, activations_in_place, lambda unet: skips_kept(unet, park, unpark)],
    ),
}


def main(options: Options) -> None:
    """Print the table, and write it if there is an `out`."""
    lines = ["# Memory of a UNet's call by size: computed, not measured", "", *explained(), ""]
    for name in options.unets:
        unet = unet_on_meta(name)
        weights = sum(parameter.numel() for parameter in unet.parameters())
        replace_self_attention(unet).mount(unet)
        replaced = sum(parameter.numel() for parameter in unet.parameters())
        lines += [
            f"## {name}: {2 * weights / 2**30:.2f} GiB of weights, {2 * replaced / 2**30:.2f} GiB with replaced layers",
            "",
            *header(["pixels", *SAVINGS, "largest tensor, as it is", "with all savings"]),
            *(row([f"{height}×{width}", *cells(unet, (height, width))]) for height, width in options.pixels),
            "",
        ]
    write_report(lines[:-1], machine(), options.out)


def explained() -> list[str]:
    """What the figures are."""
    return [
        "GiB of tensors that live together at the peak of a call for one image with guidance, in bfloat16.",
        "Each column saves what those before it do.",
        "Self-attention is replaced by line scans; weights and what kernels take for themselves are not counted.",
        f"The largest tensor is in units of {LIMIT:,} elements, above which some CUDA kernels refuse.",
    ]


def cells(unet: UNet2DConditionModel, pixels: tuple[int, int]) -> Iterator[str]:
    """The figures of a size."""
    largest = []
    for batch, blocks in SAVINGS.values():
        inputs = inputs_on_meta(unet, pixels, batch)
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block(unet))
            for mode in (torch.no_grad(), FlashAttention(), tensors := LiveTensors()):
                stack.enter_context(mode)
            unet(**inputs)
        largest.append(tensors.largest / LIMIT)
        yield f"{tensors.peak / 2**30:.3g}"
    yield from (f"{each:.2g}" for each in (largest[0], largest[-1]))
