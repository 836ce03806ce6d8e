"""How the queries, keys and values of a map become its attention's output: by line scans, linear or local attention.

These are what stands between a self-attention's projections when it is replaced: Q, K and V come from layers that were
trained for softmax attention, and the result goes to the output projection that was trained with them. A head is a
group of D = C / heads channels, as there.

Each is called as mixing(x, query, key, value, chunk), all (B, H, W, C) but the chunk, and gives y, (B, H, W, C): x is
what Q, K and V are linear in (:meth:`QueryKeyValueMixing.inputs`).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.layers.chunks import Chunk, scan_options
from gspn_dit.layers.linear import linear
from gspn_dit.layers.mixers import NUM_DIRECTIONS, linear_attention
from gspn_dit.layers.windows import Window
from gspn_dit.ops import propagate


class QueryKeyValueMixing(nn.Module):
    """The base of the mixings.

    Args:
        channels: Channels C of the map.
        heads: Heads, a divisor of C.
    """

    shares_input: ClassVar[bool] = True  # whether Q, K and V are linear in the same input: one matrix can make them

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.channels, self.heads = channels, heads

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the queries and what the keys are linear in; values are so in x."""
        return x, x

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk = None) -> Tensor:
        raise NotImplementedError


class PerHeadLinear(nn.Module):
    """A linear layer for each head alone, from its D channels to a few numbers: (B, H, W, C) to (B, H, W, K, heads).

    Its weights start at zero and its biases at `start`, so that it is a constant at first.
    """

    def __init__(self, channels: int, heads: int, outputs: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, channels // heads, outputs))
        self.bias = nn.Parameter(torch.full((heads, outputs), start))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("...gd,gdk->...kg", x.unflatten(-1, (len(self.weight), -1)), self.weight.to(x.dtype))
        return y + self.bias.T.to(y.dtype)


class GSPNMixing(QueryKeyValueMixing):
    """Line scans of V, with gates read from K and Q (arXiv 2501.12381; the correspondence is arXiv 2512.07884's 3.2):

        y = Σ_k s_k ⊙ u_k h_k + d ⊙ v,   h_k[i] = f_k ⊙ W_k h_k[i-1] + λ_k v[i]

    over the directions k, where i counts lines. V is what the scans carry. The input gate λ, per head and direction, is
    linear in the head's key, and the output gate u in its query. W are the normalised gates, which a layer of rank
    C // 16 reads from x, for each head. Decay f, scale s and direct path d are per channel.

    It starts as a normalised mean of the neighbourhood's V: λ = 1/4, u = 1, f with half-lives of 2 to 64 lines in each
    head, and s = 1 - f, so that the weights of a scan's lines sum to 1/4; d = 0.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        rank = max(channels // 16, 1)
        narrow, wide = linear(channels, rank, bias=False), linear(rank, heads * NUM_DIRECTIONS * 3)
        self.gates = nn.Sequential(narrow, wide)
        nn.init.normal_(wide.weight, std=0.02)
        self.input_gate = PerHeadLinear(channels, heads, NUM_DIRECTIONS, start=0.25)
        self.output_gate = PerHeadLinear(channels, heads, NUM_DIRECTIONS, start=1.0)
        spread = channels // heads
        half_lives = 2 ** torch.linspace(1, 6, spread).repeat(heads)
        self.log_rate = nn.Parameter((math.log(2) / half_lives).log().repeat(NUM_DIRECTIONS, 1))
        self.scale = nn.Parameter(1 - (-self.log_rate.detach().exp()).exp())
        self.direct = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk = None) -> Tensor:
        dtype = torch.promote_types(value.dtype, torch.float32)
        logits = self.gates(x).to(value.dtype).unflatten(-1, (self.heads, NUM_DIRECTIONS, 3))
        scanned = propagate(
            value,
            logits.permute(0, 1, 2, 4, 5, 3),
            self.input_gate(key).to(value.dtype),
            self.output_gate(query).to(value.dtype),
            decay=(-self.log_rate.to(dtype).exp()).exp(),  # of many lines it is close to 1: float32 at least
            scale=self.scale.to(dtype),
            **scan_options(chunk),
        )
        return torch.addcmul(scanned, self.direct.to(value.dtype), value)


class LinearMixing(QueryKeyValueMixing):
    """Linear attention over all tokens with its weights normalised, as LinFusion's (arXiv 2409.02097):

        y = φ(Q)(φ(K)ᵀV) / φ(Q)(φ(K)ᵀ1),   φ = ELU + 1

    Q and K are linear in x plus what two small layers of rank C // 16 add to it, which start at zero. There are no
    lines, so a chunk has no effect.
    """

    shares_input: ClassVar[bool] = False

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        self.query_input, self.key_input = (self.added(channels) for _ in range(2))

    @staticmethod
    def added(channels: int) -> nn.Sequential:
        rank = max(channels // 16, 1)
        return nn.Sequential(
            linear(channels, rank), nn.LayerNorm(rank), nn.LeakyReLU(), linear(rank, channels, zero=True)
        )

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.query_input(x), x + self.key_input(x)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk = None) -> Tensor:
        query, key, value = (in_heads(part, self.heads) for part in (query, key, value))
        y = linear_attention(F.elu(query) + 1, F.elu(key) + 1, value)
        return y.transpose(1, 2).reshape(x.shape).to(value.dtype)


def in_heads(x: Tensor, heads: int) -> Tensor:
    """A map (B, H, W, C) as heads of N = H · W tokens with D channels, (B, heads, N, D)."""
    return x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)


class WindowMixing(QueryKeyValueMixing):
    """Softmax attention of each token to the tokens around it, within a disc, as CLEAR's (arXiv 2412.16112).

    The disc's diameter is the side of the chunk: a token attends to those nearer than half of it. None is attention
    over the whole map. It has no parameters of its own.

    Queries are taken in squares as wide as the disc's radius, one row of squares at a time, with keys and values of the
    3 × 3 squares around: work and memory are linear in the number of tokens.
    """

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk = None) -> Tensor:
        side = chunk.side if isinstance(chunk, Window) else chunk
        height, width = x.shape[1:3]
        if side is None or side // 2 >= math.hypot(height, width):
            query, key, value = (in_heads(part, self.heads) for part in (query, key, value))
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        radius = max(side // 2, 1)
        down, across = -(-height // radius), -(-width // radius)  # how many squares there are
        padding = (0, 0, radius, (across + 1) * radius - width, radius, (down + 1) * radius - height)
        key, value = (F.pad(part, padding) for part in (key, value))
        query = F.pad(query, (0, 0, 0, across * radius - width, 0, down * radius - height))
        disc = self.disc(radius, x.device)
        column = torch.arange(-radius, (across + 1) * radius, device=x.device).unfold(0, 3 * radius, radius)
        rows = []
        for top in range(0, down * radius, radius):
            squares = query[:, top : top + radius].unflatten(2, (across, radius)).permute(2, 0, 1, 3, 4)
            around = [
                part[:, top : top + 3 * radius].unfold(2, 3 * radius, radius).permute(2, 0, 1, 4, 3)
                for part in (key, value)
            ]
            row = torch.arange(top - radius, top + 2 * radius, device=x.device)
            inside = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))[:, None, :]
            seen = disc & inside.flatten(1)[:, None]  # (across, queries, keys)
            parts = [part.flatten(2, 3).unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in (squares, *around)]
            q, k, v = (part.flatten(1, 2) for part in parts)  # (across, B · heads, tokens, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
            y = y.unflatten(1, (len(x), self.heads)).unflatten(3, (radius, radius))  # (across, B, heads, y, x, D)
            rows.append(y.permute(1, 3, 0, 4, 2, 5).flatten(4).flatten(2, 3))
        return torch.cat(rows, 1)[:, :height, :width]

    @staticmethod
    def disc(radius: int, device: torch.device) -> Tensor:
        """Which tokens of 3 × 3 squares around one are near each of its tokens, (radius², 9 radius²)."""
        inner = torch.arange(radius, device=device)
        outer = torch.arange(-radius, 2 * radius, device=device)
        apart = (inner[:, None] - outer[None, :]).square()
        return (apart[:, None, :, None] + apart[None, :, None, :] < radius**2).flatten(2).flatten(0, 1)
