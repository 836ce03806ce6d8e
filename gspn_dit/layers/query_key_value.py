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

INPUT_GATE = 0.25  # where λ starts


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
        # one matrix for all heads, of zeros between them: it needs no copy of the map by heads
        of_each = torch.diag_embed(self.weight.permute(2, 1, 0))  # (K, D, heads, heads)
        weight = of_each.permute(0, 2, 3, 1).flatten(2).flatten(0, 1)  # (K · heads, C)
        return F.linear(x, weight, self.bias.T.flatten()).unflatten(-1, (-1, len(self.weight)))


class GSPNMixing(QueryKeyValueMixing):
    """Line scans of V, with gates read from K and Q (arXiv 2501.12381; the correspondence is arXiv 2512.07884's 3.2):

        y = Σ_k s_k ⊙ u_k / z ⊙ h_k + d ⊙ v,   h_k[i] = f_k ⊙ W_k h_k[i-1] + λ_k v[i]

    over the directions k, where i counts lines. V is what the scans carry. The input gate λ, per head and direction, is
    linear in the head's key, and the output gate u in its query. W are the normalised gates, which a layer of rank
    C // 16 reads from x, for each head. Decay f, scale s and direct path d are per channel.

    z, per head and token, is what the scans of a map of ones sum to with the head's mean decay and λ = 1/4, so lines
    that a border cuts off are not missed. There is no norm as in :class:`gspn_dit.layers.mixers.GSPNMixer`: like
    attention's, the result has the size of what is averaged.

    It starts as the mean of V over the neighbourhood, weighted the same for all of a head's channels, as attention's
    mean is: λ = 1/4, u = 1, s = 1, d = 0, all three neighbours on a line alike, and half-lives from 8 lines in the
    first head to 64 in the last.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        rank = max(channels // 16, 1)
        narrow, wide = linear(channels, rank, bias=False), linear(rank, heads * NUM_DIRECTIONS * 3)
        self.gates = nn.Sequential(narrow, wide)
        nn.init.normal_(wide.weight, std=0.02)
        self.input_gate = PerHeadLinear(channels, heads, NUM_DIRECTIONS, start=INPUT_GATE)
        self.output_gate = PerHeadLinear(channels, heads, NUM_DIRECTIONS, start=1.0)
        half_lives = 2 ** torch.linspace(3, 6, heads, device=wide.bias.device).repeat_interleave(channels // heads)
        self.log_rate = nn.Parameter((math.log(2) / half_lives).log().repeat(NUM_DIRECTIONS, 1))
        self.scale = nn.Parameter(torch.ones(NUM_DIRECTIONS, channels))
        self.direct = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk = None) -> Tensor:
        dtype = torch.promote_types(value.dtype, torch.float32)
        rate = self.log_rate.to(dtype).exp()
        logits = self.gates(x).to(value.dtype).unflatten(-1, (self.heads, NUM_DIRECTIONS, 3))
        output_gate = self.output_gate(query) / self.weight_of_scans(rate, x.shape[1], x.shape[2], chunk).unsqueeze(-2)
        scanned = propagate(
            value,
            logits.permute(0, 1, 2, 4, 5, 3),
            self.input_gate(key).to(value.dtype),
            output_gate.to(value.dtype),
            decay=(-rate).exp(),  # of many lines it is close to 1: float32 at least
            scale=self.scale.to(dtype),
            **scan_options(chunk),
        )
        return torch.addcmul(scanned, self.direct.to(value.dtype), value)

    def weight_of_scans(self, rate: Tensor, height: int, width: int, chunk: Chunk) -> Tensor:
        """z, (H, W, heads): λ Σ_k (1 + f + … + fⁿ⁻¹), n the lines from a border to the token in direction k."""
        rate = rate.unflatten(-1, (self.heads, -1)).mean(-1)
        axes = []
        for length, (forth, back) in (height, rate[:2]), (width, rate[2:]):
            before, after = lines_to_borders(length, chunk, rate.device)
            axes.append(sum_of_powers(forth, before) + sum_of_powers(back, after))
        down, across = axes
        return INPUT_GATE * (down[:, None] + across[None, :])


def lines_to_borders(length: int, chunk: Chunk, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many tokens of an axis are up to each one, with it, and from each one on, until a chunk or window ends."""
    place = torch.arange(length, device=device)
    side, shift = (chunk.side, chunk.shift) if isinstance(chunk, Window) else (chunk, 0)
    if side is None or length <= side:
        return place + 1, length - place
    inside = (place - shift) % side
    return torch.minimum(place, inside) + 1, torch.minimum(length - place, side - inside)


def sum_of_powers(rate: Tensor, count: Tensor) -> Tensor:
    """1 + f + … + fⁿ⁻¹ for f = exp(-rate), rates (heads,) and counts n (L,), as (L, heads)."""
    return torch.expm1(-rate * count[:, None]) / torch.expm1(-rate)


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
        apart = self.squared_distances(radius, x.device)
        disc, itself = 4 * apart < side**2, apart == 0
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
            # (across, queries, keys); a query beyond the map sees itself, for none may see nothing
            seen = disc & inside.flatten(1)[:, None] | itself
            parts = [part.flatten(2, 3).unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in (squares, *around)]
            q, k, v = (part.flatten(1, 2) for part in parts)  # (across, B · heads, tokens, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
            y = y.unflatten(1, (len(x), self.heads)).unflatten(3, (radius, radius))  # (across, B, heads, y, x, D)
            rows.append(y.permute(1, 3, 0, 4, 2, 5).flatten(4).flatten(2, 3))
        return torch.cat(rows, 1)[:, :height, :width]

    @staticmethod
    def squared_distances(radius: int, device: torch.device) -> Tensor:
        """From each token of a square to each of the 3 × 3 squares around it, (radius², 9 radius²)."""
        inner = torch.arange(radius, device=device)
        outer = torch.arange(-radius, 2 * radius, device=device)
        apart = (inner[:, None] - outer[None, :]).square()
        return (apart[:, None, :, None] + apart[None, :, None, :]).flatten(2).flatten(0, 1)
