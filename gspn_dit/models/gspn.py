"""The generation network of the GSPN paper (arXiv 2501.12381): a U-shaped stack of blocks with per-channel scans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from gspn_dit.errors import InputError
from gspn_dit.layers.blocks import DepthwiseConv, FinalLayer, chunk_by_layer, is_whole, linear
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.ops import propagate
from gspn_dit.ops.reference import DIRECTIONS

NUM_DIRECTIONS = len(DIRECTIONS)


class GSPN(LatentModel):
    """The paper's network: line scans for attention, no positions, the condition added once at the input.

    Called as model(latents (B, in_channels, h, w), timesteps (B,) in 0 … 1000, class_labels (B,)) →
    (B, out_channels, h, w), for any h and w divisible by the patch. The first half of the blocks keep their outputs;
    each block of the second half first joins its input with the kept output that mirrors it.

    Args:
        width: Channels C of a token.
        depth: Blocks, an odd number: n in-blocks, one in the middle, n out-blocks.
        chunk: Lines a local layer's scan runs over; None makes every layer global.
        global_layers: How many of the last blocks are global, or the indices of those that are.
        stochastic_depth: Chance that training skips the last block's branch; it rises linearly from 0 at the first.
        sample_size, patch_size, in_channels, out_channels, num_classes: As :class:`LatentModel`.

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
            raise InputError(f"depth={depth!r}: give an odd number from 3, for n in-blocks, a middle and n out-blocks")
        if not isinstance(stochastic_depth, int | float) or not 0 <= stochastic_depth < 1:
            raise InputError(f"stochastic_depth={stochastic_depth!r}: give a chance in [0, 1)")
        super().__init__(
            width=width,
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_classes=num_classes,
        )
        chunks = chunk_by_layer(chunk, global_layers, depth)
        self.blocks = nn.ModuleList(
            GSPNBlock(width, chunks[i], stochastic_depth * i / (depth - 1), joins=i > depth // 2) for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.final_layer = FinalLayer(width, self.patch_values)

    def forward(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        x, condition = self.embed(latents, timesteps, class_labels)
        x = x + condition
        half = len(self.blocks) // 2
        kept = []
        for block in self.blocks[:half]:
            x = self.run(block, x)
            kept.append(x)
        x = self.run(self.blocks[half], x)
        for block in self.blocks[half + 1 :]:
            x = self.run(block, x, kept.pop())
        return self.unpatchify(self.final_layer(self.norm(x), condition))


class GSPNBlock(nn.Module):
    """x += branch(norm(x)), with two depthwise convolutions and a GSPN core in the branch.

    Args:
        joins: An out-block: its input is first joined with a kept map by Linear(2C → C).
    """

    def __init__(self, width: int, chunk: int | None, drop_chance: float, joins: bool) -> None:
        super().__init__()
        self.drop_chance = drop_chance
        self.join = linear(2 * width, width) if joins else None
        self.norm = nn.LayerNorm(width)
        self.proj_in = linear(width, width, bias=False)
        self.conv_in = DepthwiseConv(width, 7)
        self.core = GSPNCore(width, chunk)
        self.proj_core = linear(width, width, bias=False)
        self.conv_out = DepthwiseConv(width, 3, bias=False)
        self.proj_out = linear(width, width, bias=False)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        if self.join is not None:
            x = self.join(torch.cat([x, kept], dim=-1))
        y = self.core(self.conv_in(self.proj_in(self.norm(x))))
        y = self.conv_out(self.proj_core(y))
        return x + self._drop(self.proj_out(y * F.relu(y)))

    def _drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth (arXiv 1603.09382): leave the branch out for some samples, scale it up for the others."""
        if not self.training or self.drop_chance == 0:
            return branch
        keep = 1 - self.drop_chance
        return branch * branch.new_empty(len(branch), 1, 1, 1).bernoulli_(keep).div_(keep)


class GSPNCore(nn.Module):
    """Four scans with gates of their own for every channel, (B, H, W, C) to (B, H, W, C).

    y = Σ_k s_k (u_k ⊙ h_k + D_k ⊙ x) over the directions k, where h_k is the scan of x and the gates' logits, λ, u and
    D are linear in a proxy of C // 16 channels (arXiv 2501.12381).
    """

    def __init__(self, width: int, chunk: int | None) -> None:
        super().__init__()
        self.chunk = chunk
        rank = max(width // 16, 1)
        self.proxy = linear(width, rank, bias=False)
        # Xavier's bound goes by the wide output, so λ, u and D start small and so does the block's branch. Variance
        # preserving weights here, whose products are large and random, kept a small network from learning at all.
        self.gates = linear(rank, NUM_DIRECTIONS * 3 * width, bias=False)
        self.lam = linear(rank, NUM_DIRECTIONS * width, bias=False)
        self.out = linear(rank, NUM_DIRECTIONS * width, bias=False)
        self.skip = linear(rank, NUM_DIRECTIONS * width, bias=False)
        self.merge = nn.Parameter(torch.ones(NUM_DIRECTIONS))

    def forward(self, x: Tensor) -> Tensor:
        proxy = self.proxy(x)
        # Channels come innermost from the linear layers: the logical shape is the memory order that coalesces.
        gates = self.gates(proxy).unflatten(-1, (NUM_DIRECTIONS, 3, -1))
        lam = self.lam(proxy).unflatten(-1, (NUM_DIRECTIONS, -1))
        # s_k goes into the weights of u and D, which takes the sum over k of D out of the map altogether.
        out_weight = self.out.weight.unflatten(0, (NUM_DIRECTIONS, -1)) * self.merge[:, None, None]
        skip_weight = self.skip.weight.unflatten(0, (NUM_DIRECTIONS, -1)) * self.merge[:, None, None]
        out = F.linear(proxy, out_weight.flatten(0, 1)).unflatten(-1, (NUM_DIRECTIONS, -1))
        skip = F.linear(proxy, skip_weight.sum(0))
        return propagate(x, gates.to(x.dtype), lam.to(x.dtype), out.to(x.dtype), chunk=self.chunk) + skip * x
