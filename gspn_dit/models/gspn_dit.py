"""GSPN-DiT: a DiT whose attention is a GSPN scan with grouped gates, and whose modulation is mostly shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from gspn_dit.errors import InputError
from gspn_dit.layers.chunks import Chunk, as_windows, chunk_by_layer
from gspn_dit.layers.embeddings import LabelEmbedding, TimestepEmbedding
from gspn_dit.layers.feed_forward import FeedForward, SquaredReLU
from gspn_dit.layers.fused import gated_residual, gated_residual_norm, modulated_norm, modulations
from gspn_dit.layers.linear import linear
from gspn_dit.layers.mixers import MIXERS, Mixer, Projections
from gspn_dit.models.latent_model import LatentModel, check_one_each
from gspn_dit.models.registry import register_model
from gspn_dit.models.saved_model import require_count

SIZES = {
    "ti": {"width": 192, "depth": 6, "num_groups": 3},  # for small images: the digits
    "s": {"width": 384, "depth": 12, "num_groups": 6},
    "b": {"width": 768, "depth": 12, "num_groups": 12},
    "l": {"width": 1024, "depth": 24, "num_groups": 16},
    "xl": {"width": 1152, "depth": 28, "num_groups": 18},
}


@register_model("gspn-dit", SIZES)
class GSPNDiT(LatentModel):
    """DiT's width, depth and adaLN-Zero with line scans for attention; no positions, so any map at any time.

    Called as model(latents (B, in_channels, h, w), timesteps (B,) in 0 … 1000, class_labels (B,), chunk_scale=1.0) →
    (B, out_channels, h, w), for any h and w divisible by the patch. With a chunk_scale, chunks are that many times as
    long.

    Args:
        width: Channels C of a token.
        depth: Blocks.
        num_groups: Groups of C / num_groups channels that share gates, as attention's heads share weights: 64 channels
            in the named sizes.
        mlp_ratio: Hidden width of the feed-forward over C.
        conv_kernel: Side of the depthwise filter before the scan, odd.
        chunk: Lines a local layer's scan runs over; None makes every layer global. 32 is the whole token map of a 512
            pixel image (8× VAE, patch 2) and bounds a scan to 32 sequential steps on any larger one. Samples of a
            model trained on maps larger than its chunk may show the borders of chunks or windows (docs/ablations.md).
        global_layers: How many of the last blocks are global, or the indices of those that are.
        windows: `shifted` for windows of chunk × chunk tokens, whose grid lies half a window further down and to the
            right in every second local layer (docs/ablations.md, section 12); `aligned` for the same grid in all; None
            for chunks of lines that run across the whole map, as in models saved without this option. A map no larger
            than the chunk is one window.
        mixer: How tokens exchange information: `gspn`, the scans; or for comparison, inside the same block, softmax
            `attention`, `linear` attention, attention in `window`s or a depthwise `conv`
            (:mod:`gspn_dit.layers.mixers`), which have no chunk.
        sample_size, patch_size, in_channels, out_channels: As :class:`LatentModel`.
        num_classes: Classes, without the null class, whose id is `null_class` = num_classes.

    Raises:
        InputError: Sizes that do not divide; at the call, misshapen input.
    """

    _no_split_modules: ClassVar[list[str]] = ["GSPNDiTBlock"]  # what FSDP shards and gathers as one
    _repeated_blocks: ClassVar[list[str]] = ["GSPNDiTBlock"]  # what compile_repeated_blocks compiles one by one
    of_before: ClassVar[Mapping[str, Any]] = {"windows": None}

    @register_to_config
    def __init__(
        self,
        width: int = 1152,
        depth: int = 28,
        num_groups: int = 18,
        mlp_ratio: float = 3.0,
        conv_kernel: int = 3,
        chunk: int | None = 32,
        global_layers: int | Sequence[int] = 2,
        windows: Literal["aligned", "shifted"] | None = "shifted",
        mixer: str = "gspn",
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        num_classes: int = 1000,
    ) -> None:
        require_count("width", width)
        require_count("depth", depth)
        require_count("num_groups", num_groups)
        require_count("num_classes", num_classes)
        if mixer not in MIXERS:
            raise InputError(f"give one of {', '.join(MIXERS)}", argument="mixer", value=mixer)
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
        # DiT's 0.02 takes long to show through modulation that is mostly shared (docs/ablations.md, section 4)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=1.0)
        rank = max(width // 4, 1)
        self.modulation = nn.Sequential(nn.SiLU(), linear(width, 6 * width, zero=True), nn.Unflatten(-1, (6, width)))
        self.block_condition = nn.Sequential(nn.SiLU(), linear(width, rank))
        chunks = as_windows(chunk_by_layer(chunk, global_layers, depth), windows)
        self.chunks = tuple(chunks if MIXERS[mixer].scans else [None] * depth)
        self.blocks = nn.ModuleList(
            GSPNDiTBlock(width, rank, mlp_ratio, MIXERS[mixer].of_layer(i, width, num_groups, Projections(conv_kernel)))
            for i in range(depth)
        )
        self.final_layer = SharedFinalLayer(width, self.patch_values)

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
        modulation = self.modulation(condition)  # (B, 1, 1, 6, C)
        block_condition = self.block_condition(condition)  # (B, 1, 1, C // 4)
        for block, chunk in zip(self.blocks, chunks, strict=True):
            x = self.run(block, x, modulation, block_condition, chunk)
        return self.unpatchify(self.final_layer(x, modulation))


class GSPNDiTBlock(nn.Module):
    """x += g₁ · mixer(adaLN(x)); x += g₂ · mlp(adaLN(x)).

    Shift, scale and gate of both halves are the model's one modulation of the condition, plus this block's own of rank
    C / 4: 1.5C² parameters, where DiT has 6C² in every block. Both start at zero: the block is the identity.
    """

    def __init__(self, width: int, rank: int, mlp_ratio: float, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.mlp = FeedForward(width, mlp_ratio, SquaredReLU())
        self.modulation = nn.Sequential(linear(rank, 6 * width, zero=True), nn.Unflatten(-1, (6, width)))

    def forward(self, x: Tensor, modulation: Tensor, block_condition: Tensor, chunk: Chunk = None) -> Tensor:
        first, second, last = modulations(x, modulation, self.modulation(block_condition))
        y = self.mixer(modulated_norm(x, *first), chunk)
        x, y = gated_residual_norm(x, y, *second)
        return gated_residual(x, self.mlp(y), *last)


class SharedFinalLayer(nn.Module):
    """DiT's final layer with shift and scale from the model's one modulation: its first two parts plus an offset."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.modulation_offset = nn.Parameter(torch.zeros(2, width))
        self.linear = linear(width, patch_values, zero=True)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        return self.linear(modulated_norm(x, modulation[..., :2, :], self.modulation_offset[None, None, None]))
