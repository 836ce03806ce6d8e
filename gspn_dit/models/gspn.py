"""The generation network of the GSPN paper (arXiv 2501.12381): a U-shaped stack of blocks with per-channel scans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from gspn_dit.errors import InputError, is_whole, not_none
from gspn_dit.layers.chunks import chunk_by_layer
from gspn_dit.layers.convolution import DepthwiseConv
from gspn_dit.layers.drop_path import drop_path
from gspn_dit.layers.embeddings import LabelEmbedding, TimestepEmbedding
from gspn_dit.layers.gspn_core import GSPNCore
from gspn_dit.layers.linear import linear
from gspn_dit.layers.modulation import FinalLayer
from gspn_dit.models.latent_model import LatentModel, check_one_each
from gspn_dit.models.registry import register_model
from gspn_dit.models.saved_model import require_count

SIZES = {
    "ti": {"width": 192, "depth": 7},  # for small images: the digits
    "s": {"width": 368, "depth": 25},
    "b": {"width": 900, "depth": 31},
    "l": {"width": 1200, "depth": 57},
    "xl": {"width": 1500, "depth": 57},
}


@register_model("gspn", SIZES)
class GSPN(LatentModel):
    """The paper's network: line scans for attention, no positions, the condition added once at the input.

    Called as model(latents (B, in_channels, h, w), timesteps (B,) in 0 … 1000, class_labels (B,), chunk_scale=1.0) →
    (B, out_channels, h, w), for any h and w divisible by the patch. With a chunk_scale, chunks are that many times as
    long. The outputs of the first half of the blocks are kept; each block of the second half first joins its input
    with the kept output that mirrors it.

    Args:
        width: Channels C of a token.
        depth: Blocks, an odd number: n in-blocks, one in the middle, n out-blocks.
        chunk: Lines a local layer's scan runs over; None makes every layer global.
        global_layers: How many of the last blocks are global, or the indices of those that are.
        stochastic_depth: Chance that training skips the last block's branch; it rises linearly from 0 at the first.
        sample_size, patch_size, in_channels, out_channels: As :class:`LatentModel`.
        num_classes: Classes, without the null class, whose id is `null_class` = num_classes.

    Raises:
        InputError: Sizes that do not divide, an even depth; at the call, misshapen input.
    """

    _no_split_modules: ClassVar[list[str]] = ["GSPNBlock"]  # what FSDP shards and gathers as one
    _repeated_blocks: ClassVar[list[str]] = ["GSPNBlock"]  # what compile_repeated_blocks compiles one by one

    @register_to_config
    def __init__(
        self,
        width: int = 1500,
        depth: int = 57,
        chunk: int | None = 2,
        global_layers: int | Sequence[int] = 2,
        stochastic_depth: float = 0.1,
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        num_classes: int = 1000,
    ) -> None:
        if not is_whole(depth) or depth < 3 or depth % 2 == 0:
            raise InputError(
                "give an odd number from 3, for n in-blocks, a middle and n out-blocks", argument="depth", value=depth
            )
        if not isinstance(stochastic_depth, int | float) or not 0 <= stochastic_depth < 1:
            raise InputError("give a chance in [0, 1)", argument="stochastic_depth", value=stochastic_depth)
        require_count("num_classes", num_classes)
        super().__init__(
            width=width,
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
        )
        self.null_class = num_classes
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes, width)
        self.chunks = tuple(chunk_by_layer(chunk, global_layers, depth))
        self.blocks = nn.ModuleList(
            GSPNBlock(width, stochastic_depth * i / (depth - 1), joins=i > depth // 2) for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.final_layer = FinalLayer(width, self.patch_values)

    def embed(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, H, W, C) and their condition (B, 1, 1, C). Raises :class:`InputError` on misshapen input."""
        x = self.patchify(latents)
        check_one_each(latents, timesteps=timesteps, class_labels=class_labels)
        return x, (self.t_embedder(timesteps) + self.y_embedder(class_labels))[:, None, None]

    def example_condition(self, batch: int) -> dict[str, Tensor]:
        return {"class_labels": torch.zeros(batch, dtype=torch.long, device=self.device)}

    def forward(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor, chunk_scale: float = 1.0) -> Tensor:
        chunks = self.scaled_chunks(chunk_scale)
        x, condition = self.embed(latents, timesteps, class_labels)
        x = x + condition
        half = len(self.blocks) // 2
        kept: list[Tensor] = []
        for i, (block, chunk) in enumerate(zip(self.blocks, chunks, strict=True)):
            x = self.run(block, x, kept.pop() if i > half else None, chunk)
            if i < half:
                kept.append(x)
        return self.unpatchify(self.final_layer(self.norm(x), condition))


class GSPNBlock(nn.Module):
    """x += branch(norm(x)), with two depthwise convolutions and a GSPN core in the branch.

    Args:
        joins: An out-block: its input is first joined with a kept map by Linear(2C → C).
    """

    def __init__(self, width: int, drop_chance: float, joins: bool) -> None:
        super().__init__()
        self.drop_chance = drop_chance
        self.join = linear(2 * width, width) if joins else None
        self.norm = nn.LayerNorm(width)
        self.proj_in = linear(width, width, bias=False)
        self.conv_in = DepthwiseConv(width, 7)
        self.core = GSPNCore(width)
        self.proj_core = linear(width, width, bias=False)
        self.conv_out = DepthwiseConv(width, 3, bias=False)
        self.proj_out = linear(width, width, bias=False)

    def forward(self, x: Tensor, kept: Tensor | None = None, chunk: int | None = None) -> Tensor:
        if self.join is not None:
            x = self.join(torch.cat([x, not_none(kept)], dim=-1))
        y = self.core(self.conv_in(self.proj_in(self.norm(x))), chunk)
        y = self.conv_out(self.proj_core(y))
        return x + drop_path(self.proj_out(y * F.relu(y)), self.drop_chance, self.training)
