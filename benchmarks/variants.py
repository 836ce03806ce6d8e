"""What `benchmarks.quality` can change in a model beyond its options: `gspn-dit+variant=NAME`, functions of a model.

These are what results that stand today are compared with (docs/ablations.md, results/quality-cpu.md). Those that lost
are not carried along: `git show 235263c:benchmarks/variants.py` has all 34, and at that commit they last ran.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit.layers.convolution import DepthwiseConv
from gspn_dit.layers.mixers import NUM_DIRECTIONS, GSPNMixer, Mixer
from gspn_dit.layers.windows import propagate_windows
from gspn_dit.models import GSPNDiT
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.ops import propagate
from gspn_dit.ops.operator import ALL_DIRECTIONS

Scan = Callable[..., Tensor]  # called as propagate is


def gelu(model: GSPNDiT) -> None:
    """DiT's tanh-approximated GELU in place of the squared ReLU."""
    for block in model.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")


def unit_labels(model: LatentModel) -> None:
    """Label embeddings that start at unit scale, as gspn-dit's do: DiT's start at 0.02."""
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=1.0)


def scans_alone(model: GSPNDiT) -> None:
    """No skip beside the norm: its numbers are 0 and are not trained."""
    for block in model.blocks:
        nn.init.zeros_(block.mixer.direct.requires_grad_(False))


def direct_conv(model: GSPNDiT) -> None:
    """A 7 × 7 convolution of the value in place of the skip; it starts as a random one beside the value itself."""
    for block in model.blocks:
        add_direct_conv(block.mixer, model.config.width)


def add_direct_conv(mixer: Mixer, width: int) -> None:
    """norm(mixed) + conv(v) for norm(mixed) + direct ⊙ v."""
    del mixer.direct
    mixer.direct_conv = DepthwiseConv(width, 7)
    with torch.no_grad():
        mixer.direct_conv.weight.mul_(0.5)[:, :, 3, 3] += 1

    def join(mixed: Tensor, value: Tensor) -> Tensor:
        return mixer.norm(mixed).to(value.dtype) + mixer.direct_conv(value)

    mixer.join = join


def straight_lines(logit: float) -> Callable[[GSPNDiT], None]:
    """Scans that start alike in all groups, with this logit for both outer neighbours and 0 for the centre one."""

    def change(model: GSPNDiT) -> None:
        for block in model.blocks:
            start_straight(block.mixer, logit)

    return change


def start_straight(mixer: GSPNMixer, logit: float) -> None:
    """The gates' bias of a mixer, a group's logits before its input gates."""
    with torch.no_grad():
        logits = mixer.head[1].bias.view(mixer.num_groups, NUM_DIRECTIONS * 4)[:, : NUM_DIRECTIONS * 3]
        logits.copy_(torch.tensor([logit, 0.0, logit]).repeat(NUM_DIRECTIONS))


def change_scan(mixer: GSPNMixer, change: Callable[[Scan], Scan]) -> None:
    """Give a mixer a scan that is made of the one it has, which is `propagate` unless a variant was here before."""
    scan = change(getattr(mixer, "scan", propagate))

    def mix(value: Tensor, chunk: int | None = None) -> Tensor:
        gates, input_gate = mixer.token_gates(value)
        decay, scale = mixer.channel_factors(torch.promote_types(value.dtype, torch.float32))
        return scan(value, gates, input_gate, decay=decay, scale=scale, chunk=chunk)

    mixer.scan, mixer.mix = scan, mix


def windows(model: GSPNDiT, shifted: bool = False) -> None:
    """Local layers scan windows whose side is their chunk; shifted, every second grid starts half a window later."""
    local = [block for block, chunk in zip(model.blocks, model.chunks, strict=True) if chunk is not None]
    for i, block in enumerate(local):
        change_scan(block.mixer, in_windows(shifted and i % 2 == 1))


def in_windows(shifted: bool) -> Callable[[Scan], Scan]:
    """A scan in windows as large as the chunk that it is asked for."""

    def change(scan: Scan) -> Scan:
        def scan_windows(*operands: Tensor, chunk: int | None, **options: Any) -> Tensor:
            shift = chunk // 2 if chunk is not None and shifted else 0
            return propagate_windows(*operands, window=chunk, shift=shift, scan=scan, **options)

        return scan_windows

    return change


def shifted_windows(model: GSPNDiT) -> None:
    """Windows whose grid lies half a window further down and to the right in every second local layer."""
    windows(model, shifted=True)


def two_directions(model: GSPNDiT) -> None:
    """Layers scan down and up, or right and left, in turn. What they hold for the other two directions is not used."""
    for i, block in enumerate(model.blocks):
        change_scan(block.mixer, in_directions(slice(2, 4) if i % 2 else slice(0, 2)))


def in_directions(chosen: slice) -> Callable[[Scan], Scan]:
    """A scan in some of the four directions that its operands are of."""

    def change(scan: Scan) -> Scan:
        def scan_some(
            x: Tensor, gates: Tensor, input_gate: Tensor, *, decay: Tensor, scale: Tensor, **options: Any
        ) -> Tensor:
            of_tokens = gates[:, :, :, chosen], input_gate[:, :, :, chosen]
            of_channels = {"decay": decay[chosen], "scale": scale[chosen]}
            return scan(x, *of_tokens, **of_channels, directions=ALL_DIRECTIONS[chosen], **options)

        return scan_some

    return change


VARIANTS: dict[str, Callable[[LatentModel], None]] = {
    "gelu": gelu,
    "unit-labels": unit_labels,
    "scans-alone": scans_alone,
    "direct-conv": direct_conv,
    "straight-84": straight_lines(-3.0),
    "straight-97": straight_lines(-5.0),
    "windows": windows,
    "shifted-windows": shifted_windows,
    "two-directions": two_directions,
}
OF_ANY_FAMILY = ("unit-labels",)  # the others change what only a gspn-dit has
