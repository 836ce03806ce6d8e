"""What `benchmarks.quality` can change in a model beyond its options: `gspn-dit+variant=NAME`, functions of a model.

These are what results that stand today are compared with (docs/ablations.md, results/quality-cpu.md). Those that lost
are not carried along: `git show 235263c:benchmarks/variants.py` has all 34, and at that commit they last ran.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gspn_dit.layers.chunks import Chunk, scan_options
from gspn_dit.layers.convolution import DepthwiseConv
from gspn_dit.layers.mixers import NUM_DIRECTIONS, GSPNMixer, Mixer
from gspn_dit.models import GSPNDiT
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.ops import propagate
from gspn_dit.ops.operator import ALL_DIRECTIONS


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
    """norm(mix(v)) + conv(v) for norm(mix(v)) + direct ⊙ v."""
    del mixer.direct
    mixer.direct_conv = DepthwiseConv(width, 7)
    with torch.no_grad():
        mixer.direct_conv.weight.mul_(0.5)[:, :, 3, 3] += 1

    def join(value: Tensor, *options: int | None) -> Tensor:
        return mixer.norm(mixer.mix(value, *options)).to(value.dtype) + mixer.direct_conv(value)

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


def two_directions(model: GSPNDiT) -> None:
    """Layers scan down and up, or right and left, in turn. What they hold for the other two directions is not used."""
    for i, block in enumerate(model.blocks):
        scan_only(block.mixer, slice(2, 4) if i % 2 else slice(0, 2))


def scan_only(mixer: GSPNMixer, chosen: slice) -> None:
    """A mixer of some of its four directions."""

    def scan(value: Tensor, chunk: Chunk = None, *, direct: Tensor | None = None) -> Tensor:
        gates, input_gate = mixer.token_gates(value)
        decay, scale = mixer.channel_factors(torch.promote_types(value.dtype, torch.float32))
        of_tokens = gates[:, :, :, chosen], input_gate[:, :, :, chosen]
        of_channels = {"decay": decay[chosen], "scale": scale[chosen], "direct": direct}
        cut = scan_options(chunk)
        return propagate(value, *of_tokens, **of_channels, **cut, directions=ALL_DIRECTIONS[chosen])

    mixer.scan = scan


VARIANTS: dict[str, Callable[[LatentModel], None]] = {
    "gelu": gelu,
    "unit-labels": unit_labels,
    "scans-alone": scans_alone,
    "direct-conv": direct_conv,
    "straight-84": straight_lines(-3.0),
    "straight-97": straight_lines(-5.0),
    "two-directions": two_directions,
}
OF_ANY_FAMILY = ("unit-labels",)  # the others change what only a gspn-dit has
