"""What sites of a map meet in, inside a block of gspn-dit: line scans, or what they are measured against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.layers.blocks import DepthwiseConv, linear, without_autocast
from gspn_dit.ops import propagate
from gspn_dit.ops.reference import DIRECTIONS

NUM_DIRECTIONS = len(DIRECTIONS)


class Mixer(nn.Module):
    """What all mixers have in common, (B, H, W, C) to (B, H, W, C):

        v = conv(W_v x);  y = proj(norm(mix(v)) + d ⊙ v)

    They differ in `mix` alone, so that a comparison of two is one of what sites meet in, not of the convolution or the
    norm around it. The norm is over each group (RMS, arXiv 1910.07467); it has no weight, which `proj` would only
    repeat. d, a number a channel, starts at 1: what a site itself says goes by beside the norm and is not drowned by
    what comes from afar.

    Args:
        width: Channels C.
        num_groups: Groups of channels that are normalised together; in scans they share gates.
        conv_kernel: Side of the depthwise filter on the value.
        chunk: Lines that a scan runs over; the other mixers have no lines.
    """

    def __init__(self, width: int, num_groups: int, conv_kernel: int, chunk: int | None) -> None:
        super().__init__()
        self.num_groups, self.chunk = num_groups, chunk
        self.value = linear(width, width)
        self.conv = DepthwiseConv(width, conv_kernel)
        self.make_mix(width)
        self.direct = nn.Parameter(torch.ones(width))
        self.proj = linear(width, width)

    def make_mix(self, width: int) -> None:
        """Make the layers that :meth:`mix` needs."""
        raise NotImplementedError

    def mix(self, value: Tensor) -> Tensor:
        """Let the sites of the value (B, H, W, C) meet; the same shape."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        value = self.conv(self.value(x))
        return self.proj(self.join(self.mix(value), value))

    def join(self, mixed: Tensor, value: Tensor) -> Tensor:
        """norm(mixed) + d ⊙ v, in v's dtype."""
        return torch.addcmul(self.norm(mixed).to(value.dtype), self.direct.to(value.dtype), value)

    def norm(self, y: Tensor) -> Tensor:
        """Each group's channels over their root mean square, in y's dtype."""
        groups = y.unflatten(-1, (self.num_groups, -1))
        with without_autocast(y.device):
            return F.rms_norm(groups, groups.shape[-1:], eps=1e-6).flatten(-2)


class GSPNMixer(Mixer):
    """Scans in four directions that forget at a learned pace, the mixer of gspn-dit (arXiv 2501.12381):

        mix(v) = Σ_k s_k ⊙ h_k,   h_k[i] = f_k ⊙ W_k h_k[i-1] + λ_k ⊙ v[i]

    A head of rank C // 16 reads v, which has seen its neighbourhood, and gives every group 12 gate logits and 4 λ.
    Lines start 84% straight, that much of them from the neighbour right before, in the first group, to 99.6% in the
    last: as a mean of three they would have spread over nine rows when they have crossed 32 columns, and across
    57 even the first are not heard (docs/ablations.md, section 11). λ is the head's output itself and starts at 1/4.

    f and s, numbers a channel and direction, make another filter of every channel, as a convolution has them, while
    gates stay few. f = exp(-rate) starts with half-lives of 2 to 64 lines in each group: W's rows sum to 1, and without
    f a scan would go on adding up all the lines it has run, and far ones drown near ones. s starts at random, of either
    sign: as four equal sums scans would all be one blur (docs/ablations.md, section 8). The norm that follows takes the
    scale out.
    """

    def make_mix(self, width: int) -> None:
        rank = max(width // 16, 1)
        outputs = self.num_groups * NUM_DIRECTIONS * 4
        self.head = nn.Sequential(linear(width, rank, bias=False), linear(rank, outputs))
        nn.init.normal_(self.head[1].weight, std=0.02)
        with torch.no_grad():
            logits, lam = self.head[1].bias.view(self.num_groups, -1).split([NUM_DIRECTIONS * 3, NUM_DIRECTIONS], -1)
            aside = torch.linspace(-3.0, -7.0, self.num_groups)
            logits.copy_((aside[:, None] * torch.tensor([1.0, 0.0, 1.0])).repeat(1, NUM_DIRECTIONS))
            lam.fill_(0.25)
        spread = width // self.num_groups if self.num_groups < width else width  # channels from 2 to 64 lines
        half_lives = 2 ** torch.linspace(1, 6, spread).repeat(width // spread)
        self.log_rate = nn.Parameter((math.log(2) / half_lives).log().repeat(NUM_DIRECTIONS, 1))
        self.scale = nn.Parameter(torch.randn(NUM_DIRECTIONS, width))

    def mix(self, value: Tensor) -> Tensor:
        gates, lam = self.gates_and_lam(value)
        decay, scale = self.channel_factors(torch.promote_types(value.dtype, torch.float32))
        return propagate(value, gates, lam, decay=decay, scale=scale, chunk=self.chunk)

    def channel_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """f and s, (4, C). A half-life of many lines is an f close to 1: float32 at least."""
        return (-self.log_rate.to(dtype).exp()).exp(), self.scale.to(dtype)

    def gates_and_lam(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Gate logits (B, H, W, 4, 3, G) and λ (B, H, W, 4, G): views of one map, a group's 16 numbers side by side."""
        head = self.head(value).to(value.dtype).unflatten(-1, (self.num_groups, -1))  # (B, H, W, G, 16)
        gates, lam = head.split((NUM_DIRECTIONS * 3, NUM_DIRECTIONS), dim=-1)
        return gates.unflatten(-1, (NUM_DIRECTIONS, 3)).permute(0, 1, 2, 4, 5, 3), lam.permute(0, 1, 2, 4, 3)


class AttentionMixer(Mixer):
    """Softmax attention over all sites, in heads of 64 channels: quadratic in the number of sites.

    Queries and keys are linear in v. There are no positions but what the convolution's zero padding tells. They are
    2C² parameters that scans do without: the strong form of the comparison.
    """

    def make_mix(self, width: int) -> None:
        self.head_width = math.gcd(width, 64)
        self.query_key = linear(width, 2 * width)

    def mix(self, value: Tensor) -> Tensor:
        query, key = self.query_key(value).chunk(2, dim=-1)
        y = self.attend(*(self.heads(part) for part in (query, key, value)))  # (B, heads, N, D)
        return y.transpose(1, 2).reshape(value.shape)

    def heads(self, x: Tensor) -> Tensor:
        """(B, H, W, C) as heads of sites, (B, heads, N, D)."""
        return x.flatten(1, 2).unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(QKᵀ / √D) V, all (B, heads, N, D)."""
        return F.scaled_dot_product_attention(query, key, value)


class LinearAttentionMixer(AttentionMixer):
    """ReLU linear attention over all sites, as SANA's (arXiv 2410.10629, section 2.2): linear in the number of sites.

    The sums over sites, and the quotient of two of them, are in float32 whatever the dtype.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """φ(Q)(φ(K)ᵀV) / φ(Q)(φ(K)ᵀ1) with φ = ReLU, all (B, heads, N, D); 0 at a site whose query meets no key."""
        with without_autocast(query.device):
            query, key, value = query.float().relu(), key.float().relu(), value.float()
            # Means over sites, not sums: ε weighs the same on every map.
            summary = key.transpose(-1, -2) @ (value / key.shape[-2])  # (B, heads, D, D)
            weight = query @ key.mean(-2).unsqueeze(-1)  # (B, heads, N, 1)
            return query @ summary / (weight + 1e-6)


class ConvMixer(Mixer):
    """A second depthwise convolution, 7 × 7, where the scans would be: three sites to each side and no further."""

    def make_mix(self, width: int) -> None:
        self.wide_conv = DepthwiseConv(width, 7)

    def mix(self, value: Tensor) -> Tensor:
        return self.wide_conv(value)


MIXERS: dict[str, type[Mixer]] = {
    "gspn": GSPNMixer,
    "attention": AttentionMixer,
    "linear": LinearAttentionMixer,
    "conv": ConvMixer,
}
