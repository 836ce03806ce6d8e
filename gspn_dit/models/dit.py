"""The baseline: DiT as published ("Scalable Diffusion Models with Transformers", arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from gspn_dit.errors import InputError
from gspn_dit.layers.blocks import FeedForward, FinalLayer, LayerNorm, linear, modulate
from gspn_dit.layers.embeddings import sincos_positions
from gspn_dit.models.latent_model import LatentModel, require_count


class DiT(LatentModel):
    """A transformer with adaLN-Zero conditioning, softmax attention and fixed sin-cos positions.

    Parameters are named as in the published checkpoints, so those load. Called as
    model(latents (B, in_channels, h, w), timesteps (B,) in 0 … 1000, class_labels (B,)) → (B, out_channels, h, w),
    for any h and w divisible by the patch: the position table is the model's own at the size it was made for and is
    computed for the size at hand at any other.

    Args:
        width: Channels C of a token; a multiple of 4 and of num_heads.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the feed-forward over C.
        sample_size, patch_size, in_channels, out_channels, num_classes: As :class:`LatentModel`.

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
    ) -> None:
        require_count("width", width)
        require_count("depth", depth)
        require_count("num_heads", num_heads)
        if width % num_heads or width % 4:
            raise InputError(f"width={width!r}: give a multiple of num_heads={num_heads} and of 4")
        super().__init__(
            width=width,
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_classes=num_classes,
        )
        self.grid = (self.sample_height // patch_size, self.sample_width // patch_size)
        positions = sincos_positions(*self.grid, width).flatten(1, 2)  # (1, N, C)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, self.patch_values)

    def forward(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        x, condition = self.embed(latents, timesteps, class_labels)
        x = x + self._positions(x)
        for block in self.blocks:
            x = self.run(block, x, condition)
        return self.unpatchify(self.final_layer(x, condition))

    def _positions(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        if (height, width) == self.grid:
            return self.pos_embed.unflatten(1, self.grid)
        return sincos_positions(height, width, channels, x.device).to(self.pos_embed.dtype)


class DiTBlock(nn.Module):
    """x += g₁ · attention(adaLN(x)); x += g₂ · mlp(adaLN(x)), with shift, scale and gate from the condition."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = LayerNorm(width)
        self.mlp = FeedForward(width, mlp_ratio)
        # Zero: every gate starts shut and the block is the identity.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 6 * width, zero=True))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Attention(nn.Module):
    """Softmax self-attention over all the sites of a map, (B, H, W, C) to (B, H, W, C)."""

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
