"""The baseline: DiT as published ("Scalable Diffusion Models with Transformers", arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from gspn_dit.errors import InputError
from gspn_dit.layers.embeddings import LabelEmbedding, TimestepEmbedding, sincos_positions
from gspn_dit.layers.feed_forward import FeedForward
from gspn_dit.layers.fused import gated_residual, gated_residual_norm, modulated_norm, modulations
from gspn_dit.layers.linear import linear
from gspn_dit.layers.modulation import FinalLayer
from gspn_dit.models.latent_model import LatentModel, check_one_each
from gspn_dit.models.registry import register_model
from gspn_dit.models.saved_model import require_count

SIZES = {
    "ti": {"width": 192, "depth": 6, "num_heads": 3},  # for small images: the digits
    "s": {"width": 384, "depth": 12, "num_heads": 6},
    "b": {"width": 768, "depth": 12, "num_heads": 12},
    "l": {"width": 1024, "depth": 24, "num_heads": 16},
    "xl": {"width": 1152, "depth": 28, "num_heads": 16},
}


@register_model("dit", SIZES)
class DiT(LatentModel):
    """A transformer with adaLN-Zero conditioning, softmax attention and fixed sin-cos positions.

    Parameters are named as in the published checkpoints, so those load. Called as
    model(latents (B, in_channels, h, w), timesteps (B,) in 0 … 1000, class_labels (B,)) → (B, out_channels, h, w), for
    any h and w divisible by the patch: the position table is the model's own at the size it was made for and is
    computed for the size at hand at any other. Weights of diffusers have positions there that are spread over the
    model's own grid, as diffusers does it. A chunk_scale other than 1 is refused: attention has no chunks.

    Args:
        width: Channels C of a token; a multiple of 4 and of num_heads.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the feed-forward over C.
        sample_size, patch_size, in_channels, out_channels: As :class:`LatentModel`.
        num_classes: Classes, without the null class, whose id is `null_class` = num_classes.
        time_embedding: Whose time and frequencies timesteps are embedded by, as
            :class:`~gspn_dit.layers.embeddings.TimestepEmbedding` has it; weights fit the one they were trained with.
            `diffusers` also says where positions of other sizes are.

    Raises:
        InputError: Sizes that do not divide; at the call, misshapen input.
    """

    _no_split_modules: ClassVar[list[str]] = ["DiTBlock"]  # what FSDP shards and gathers as one
    _repeated_blocks: ClassVar[list[str]] = ["DiTBlock"]  # what compile_repeated_blocks compiles one by one

    @register_to_config
    def __init__(
        self,
        width: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        num_classes: int = 1000,
        time_embedding: str = "dit",
    ) -> None:
        require_count("width", width)
        require_count("depth", depth)
        require_count("num_heads", num_heads)
        require_count("num_classes", num_classes)
        if width % num_heads or width % 4:
            raise InputError(f"give a multiple of num_heads={num_heads} and of 4", argument="width", value=width)
        super().__init__(
            width=width,
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
        )
        self.null_class = num_classes
        self.t_embedder = TimestepEmbedding(width, time_embedding)
        self.y_embedder = LabelEmbedding(num_classes, width)
        self.grid = (self.sample_height // patch_size, self.sample_width // patch_size)
        positions = sincos_positions(*self.grid, width).flatten(1, 2)  # (1, N, C)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, self.patch_values)

    @classmethod
    def published(cls, path: str | PathLike, **kwargs: Any) -> Self | None:
        """The model of a file of DiT's or SiT's own code, or of a DiTTransformer2DModel; None for one of this package.

        Takes and raises what :func:`~gspn_dit.models.published.find` does.
        """
        from gspn_dit.models.published import find  # which imports this module

        return find(cls, path, **kwargs)

    def embed(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, H, W, C) and their condition (B, 1, 1, C). Raises :class:`InputError` on misshapen input."""
        x = self.patchify(latents)
        check_one_each(latents, timesteps=timesteps, class_labels=class_labels)
        return x, (self.t_embedder(timesteps) + self.y_embedder(class_labels))[:, None, None]

    def example_condition(self, batch: int) -> dict[str, Tensor]:
        return {"class_labels": torch.zeros(batch, dtype=torch.long, device=self.device)}

    def forward(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor, chunk_scale: float = 1.0) -> Tensor:
        self.check_chunk_scale(chunk_scale)  # refuses any but 1: attention has no chunks
        x, condition = self.embed(latents, timesteps, class_labels)
        x = x + self._positions(x)
        for block in self.blocks:
            x = self.run(block, x, condition)
        return self.unpatchify(self.final_layer(x, condition))

    def _positions(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        if (height, width) == self.grid:
            return self.pos_embed.unflatten(1, self.grid)
        over = self.grid if self.t_embedder.convention == "diffusers" else None
        return sincos_positions(height, width, channels, x.device, over).to(self.pos_embed.dtype)


class DiTBlock(nn.Module):
    """x += g₁ · attention(adaLN(x)); x += g₂ · mlp(adaLN(x)), with shift, scale and gate from the condition."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.mlp = FeedForward(width, mlp_ratio)
        # Zero: every gate starts shut and the block is the identity.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 6 * width, zero=True))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        first, second, last = modulations(x, self.adaLN_modulation(condition).unflatten(-1, (6, -1)))
        y = self.attn(modulated_norm(x, *first))
        x, y = gated_residual_norm(x, y, *second)
        return gated_residual(x, self.mlp(y), *last)


class Attention(nn.Module):
    """Softmax self-attention over all the tokens of a map, (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = linear(width, 3 * width)
        self.proj = linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, C/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C/heads)
        return self.proj(y.transpose(1, 2).reshape(x.shape))
