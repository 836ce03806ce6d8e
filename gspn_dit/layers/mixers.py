"""Token mixers: GSPN line scans, and the baselines they are compared with.

A mixer alone maps a value map (B, H, W, C) to one of the same shape, for a classifier or in place of a U-Net's
attention. With :class:`Projections` it is the layer of gspn-dit's blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.errors import InputError
from gspn_dit.layers.chunks import Chunk
from gspn_dit.layers.convolution import DepthwiseConv
from gspn_dit.layers.linear import linear
from gspn_dit.layers.norm import group_rms_norm, without_autocast
from gspn_dit.layers.windows import Window, propagate_windows
from gspn_dit.ops import propagate
from gspn_dit.ops.reference import DIRECTIONS

NUM_DIRECTIONS = len(DIRECTIONS)


@dataclass(frozen=True)
class Projections:
    """The layers around a mixer in a block of gspn-dit.

    Before it a linear layer makes the value, which a depthwise convolution filters. After it a skip carries the value
    past the mixer, and a linear layer projects the sum of both.

    Args:
        conv_kernel: Side of the depthwise filter, odd.
    """

    conv_kernel: int = 3

    def before(self, width: int) -> tuple[nn.Linear, DepthwiseConv]:
        """The value projection and the filter: a mixer's `value` and `conv`."""
        return linear(width, width), DepthwiseConv(width, self.conv_kernel)

    def after(self, width: int) -> tuple[nn.Parameter, nn.Linear]:
        """The skip, one number per channel, and the output projection: a mixer's `direct` and `proj`."""
        return nn.Parameter(torch.ones(width)), linear(width, width)


class Mixer(nn.Module):
    """A layer in which the tokens of a map exchange information, (B, H, W, C) to (B, H, W, C).

    Alone, y = mix(x). With projections, the layer of gspn-dit's blocks:

        v = conv(W_v x);  y = proj(norm(mix(v)) + direct ⊙ v)

    Mixers differ only in `mix`, so a comparison isolates the mixing. The norm is over each group of channels (RMS,
    arXiv 1910.07467); it has no weight, which `proj` would only repeat. `direct` (per channel, initialised to 1) is a
    skip around the norm that keeps a token's own value from being swamped by long-range contributions.

    Called as mixer(x, chunk=None). A chunk is the number of lines that a scan runs over, or a window; None is the whole
    map.

    A subclass makes its own layers in its constructor between the two lines that make the projections (so that
    parameters keep their order), and defines :meth:`mix`.

    Args:
        width: Channels C.
        num_groups: Groups of channels that are normalised together; in scans they share gates. A divisor of C.
        projections: The layers around the mixing; None for a mixer alone.

    Raises:
        InputError: Groups that do not divide the width; at the call, a chunk for a mixer that has no lines.
    """

    value: nn.Linear
    conv: DepthwiseConv
    direct: nn.Parameter
    proj: nn.Linear
    scans: ClassVar[bool] = False  # whether it runs over lines, so that `mix` takes a chunk

    def __init__(self, width: int, num_groups: int, projections: Projections | None = None) -> None:
        super().__init__()
        if num_groups < 1 or width % num_groups:
            raise InputError(f"give a divisor of width={width}", argument="num_groups", value=num_groups)
        self.num_groups, self.projected = num_groups, projections is not None
        if projections is not None:
            self.value, self.conv = projections.before(width)

    def mix(self, value: Tensor) -> Tensor:
        """Let the tokens of the value (B, H, W, C) exchange information; the same shape.

        A mixer that scans takes the chunk as the second argument.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, chunk: Chunk = None) -> Tensor:
        if chunk is not None and not self.scans:
            raise InputError(
                f"a {type(self).__name__} has no lines", argument="chunk", value=chunk, remedy="leave it out"
            )
        options = (chunk,) if self.scans else ()
        if not self.projected:
            return self.mix(x, *options)
        value = self.conv(self.value(x))
        return self.proj(self.join(self.mix(value, *options), value))

    def join(self, mixed: Tensor, value: Tensor) -> Tensor:
        """norm(mixed) + direct ⊙ v, in v's dtype."""
        return torch.addcmul(self.norm(mixed).to(value.dtype), self.direct.to(value.dtype), value)

    def norm(self, y: Tensor) -> Tensor:
        """Each group's channels over their root mean square, in y's dtype."""
        return group_rms_norm(y, self.num_groups)


class GSPNMixer(Mixer):
    """Line scans in four directions with a learned decay, the mixer of gspn-dit (arXiv 2501.12381):

        mix(v) = Σ_k s_k ⊙ h_k,   h_k[i] = f_k ⊙ W_k h_k[i-1] + λ_k ⊙ v[i]

    over the directions k, where i counts lines. W_k are the normalised gates and λ_k is the input gate, per group of
    channels and token; f_k is the decay and s_k the scale, per channel.

    A head of rank C // 16 reads v and gives every group 12 gate logits and 4 input gates. At initialisation the centre
    neighbour has 84% of the weight in the first group, rising to 99.6% in the last. With equal thirds a signal spreads
    over about nine rows after 32 columns; across 57 columns even 84% is too diffuse to learn from (docs/ablations.md,
    section 11). λ is the head's output without an activation and starts at 1/4.

    f and s make a different filter of every channel, as a convolution has them, while gates stay few. f = exp(-rate)
    starts with half-lives of 2 to 64 lines in each group: the rows of W sum to 1, so without f a scan would add up all
    the lines before, and distant lines would drown near ones. s starts at random, of either sign: with four equal sums
    the scans would all be one blur (docs/ablations.md, section 8). The norm that follows takes the size of s out.
    """

    scans: ClassVar[bool] = True

    def __init__(self, width: int, num_groups: int, projections: Projections | None = None) -> None:
        super().__init__(width, num_groups, projections)
        rank = max(width // 16, 1)
        narrow, wide = linear(width, rank, bias=False), linear(rank, num_groups * NUM_DIRECTIONS * 4)
        self.head = nn.Sequential(narrow, wide)
        nn.init.normal_(wide.weight, std=0.02)
        with torch.no_grad():
            by_group = wide.bias.view(num_groups, -1)
            logits, input_gate = by_group.split([NUM_DIRECTIONS * 3, NUM_DIRECTIONS], -1)
            aside = torch.linspace(-3.0, -7.0, num_groups)
            logits.copy_((aside[:, None] * torch.tensor([1.0, 0.0, 1.0])).repeat(1, NUM_DIRECTIONS))
            input_gate.fill_(0.25)
        spread = width // num_groups if num_groups < width else width  # channels from 2 to 64 lines
        half_lives = 2 ** torch.linspace(1, 6, spread).repeat(width // spread)
        self.log_rate = nn.Parameter((math.log(2) / half_lives).log().repeat(NUM_DIRECTIONS, 1))
        self.scale = nn.Parameter(torch.randn(NUM_DIRECTIONS, width))
        if projections is not None:
            self.direct, self.proj = projections.after(width)

    def mix(self, value: Tensor, chunk: Chunk = None) -> Tensor:
        gates, input_gate = self.token_gates(value)
        decay, scale = self.channel_factors(torch.promote_types(value.dtype, torch.float32))
        if isinstance(chunk, Window):
            window, shift = chunk.side, chunk.shift
            return propagate_windows(value, gates, input_gate, window=window, shift=shift, decay=decay, scale=scale)
        return propagate(value, gates, input_gate, decay=decay, scale=scale, chunk=chunk)

    def channel_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decay f and scale s, (4, C). A half-life of many lines is an f close to 1: float32 at least."""
        return (-self.log_rate.to(dtype).exp()).exp(), self.scale.to(dtype)

    def token_gates(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Gate logits (B, H, W, 4, 3, G) and input gates (B, H, W, 4, G).

        Both are views of one map in which a group's 16 numbers lie side by side.
        """
        head = self.head(value).to(value.dtype).unflatten(-1, (self.num_groups, -1))  # (B, H, W, G, 16)
        gates, input_gate = head.split((NUM_DIRECTIONS * 3, NUM_DIRECTIONS), dim=-1)
        return gates.unflatten(-1, (NUM_DIRECTIONS, 3)).permute(0, 1, 2, 4, 5, 3), input_gate.permute(0, 1, 2, 4, 3)


class AttentionMixer(Mixer):
    """Softmax attention over all tokens, in heads of 64 channels: quadratic in the number of tokens.

    Queries and keys are linear in v: 2C² parameters that scans do without, so this is the strong form of the
    comparison. Nothing tells a token its place but the zero padding of the convolution before.
    """

    def __init__(self, width: int, num_groups: int, projections: Projections | None = None) -> None:
        super().__init__(width, num_groups, projections)
        self.head_width = math.gcd(width, 64)
        self.query_key = linear(width, 2 * width)
        if projections is not None:
            self.direct, self.proj = projections.after(width)

    def mix(self, value: Tensor) -> Tensor:
        query, key = self.query_key(value).chunk(2, dim=-1)
        y = self.attend(*(self.heads(part) for part in (query, key, value)))  # (B, heads, N, D)
        return y.transpose(1, 2).reshape(value.shape)

    def heads(self, x: Tensor) -> Tensor:
        """(B, H, W, C) as heads of N = H · W tokens with D channels, (B, heads, N, D)."""
        return x.flatten(1, 2).unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(QKᵀ / √D) V, all (B, heads, N, D)."""
        return F.scaled_dot_product_attention(query, key, value)


class LinearAttentionMixer(AttentionMixer):
    """ReLU linear attention over all tokens, as SANA's (arXiv 2410.10629, section 2.2): linear in their number.

    The sums over tokens, and the quotient of two of them, are in float32 whatever the dtype.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """φ(Q)(φ(K)ᵀV) / φ(Q)(φ(K)ᵀ1) with φ = ReLU, all (B, heads, N, D); 0 at a token whose query meets no key."""
        with without_autocast(query.device):
            query, key, value = query.float().relu(), key.float().relu(), value.float()
            # Means over tokens, not sums: ε weighs the same on every map.
            summary = key.transpose(-1, -2) @ (value / key.shape[-2])  # (B, heads, D, D)
            weight = query @ key.mean(-2).unsqueeze(-1)  # (B, heads, N, 1)
            return query @ summary / (weight + 1e-6)


class ConvMixer(Mixer):
    """A depthwise convolution of 7 × 7 in place of the scans: three tokens to each side and no further."""

    def __init__(self, width: int, num_groups: int, projections: Projections | None = None) -> None:
        super().__init__(width, num_groups, projections)
        self.wide_conv = DepthwiseConv(width, 7)
        if projections is not None:
            self.direct, self.proj = projections.after(width)

    def mix(self, value: Tensor) -> Tensor:
        return self.wide_conv(value)


MIXERS: dict[str, type[Mixer]] = {
    "gspn": GSPNMixer,
    "attention": AttentionMixer,
    "linear": LinearAttentionMixer,
    "conv": ConvMixer,
}
