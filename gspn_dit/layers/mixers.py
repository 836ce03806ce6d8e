"""Token mixers: GSPN line scans, and the baselines they are compared with.

A mixer alone maps a value map (B, H, W, C) to one of the same shape, for a classifier or in place of a U-Net's
attention. With :class:`Projections` it is the layer of gspn-dit's blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.errors import InputError
from gspn_dit.layers.chunks import Chunk, scan_options
from gspn_dit.layers.convolution import DepthwiseConv
from gspn_dit.layers.linear import linear
from gspn_dit.layers.norm import group_rms_norm, without_autocast
from gspn_dit.ops import propagate
from gspn_dit.ops.reference import DIRECTIONS

NUM_DIRECTIONS = len(DIRECTIONS)
WINDOW = 8  # side of the windows of window attention, in tokens


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

    @classmethod
    def of_layer(cls, layer: int, width: int, num_groups: int, projections: Projections | None = None) -> Mixer:
        """The mixer of a model's layer 0, 1, …: the same in all, but for a mixer that alternates."""
        return cls(width, num_groups, projections)

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
        return self.proj(self.join(value, *options))

    def join(self, value: Tensor, *options: Chunk) -> Tensor:
        """norm(mix(v)) + direct ⊙ v, in v's dtype; the options are those of :meth:`mix`."""
        mixed = self.mix(value, *options)
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

    In a block, norm and skip are the operator's tail: nothing of the map's size is kept for the norm's backward pass.
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
            sides = torch.tensor([1.0, 0.0, 1.0])
            aside = torch.linspace(-3.0, -7.0, num_groups, device=sides.device)  # transformers may leave it on the CPU
            logits.copy_((aside[:, None] * sides).repeat(1, NUM_DIRECTIONS))
            input_gate.fill_(0.25)
        spread = width // num_groups if num_groups < width else width  # channels from 2 to 64 lines
        half_lives = 2 ** torch.linspace(1, 6, spread, device=wide.bias.device).repeat(width // spread)
        self.log_rate = nn.Parameter((math.log(2) / half_lives).log().repeat(NUM_DIRECTIONS, 1))
        self.scale = nn.Parameter(torch.randn(NUM_DIRECTIONS, width))
        if projections is not None:
            self.direct, self.proj = projections.after(width)

    def mix(self, value: Tensor, chunk: Chunk = None) -> Tensor:
        return self.scan(value, chunk)

    def join(self, value: Tensor, *options: Chunk) -> Tensor:
        return self.scan(value, *options, direct=self.direct)

    def scan(self, value: Tensor, chunk: Chunk = None, *, direct: Tensor | None = None) -> Tensor:
        """The sum of the scans, or with `direct` norm(that) + direct ⊙ v."""
        gates, input_gate = self.token_gates(value)
        dtype = torch.promote_types(value.dtype, torch.float32)
        decay, scale = self.channel_factors(dtype)
        return propagate(
            value,
            gates,
            input_gate,
            decay=decay,
            scale=scale,
            direct=None if direct is None else direct.to(dtype),
            **scan_options(chunk),
        )

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
    """ReLU linear attention over all tokens, as SANA's (arXiv 2410.10629, section 2.2): linear in their number."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """φ(Q)(φ(K)ᵀV) / φ(Q)(φ(K)ᵀ1) with φ = ReLU, all (B, heads, N, D); 0 at a token whose query meets no key."""
        return linear_attention(query.relu(), key.relu(), value)


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """φ(Q)(φ(K)ᵀV) / φ(Q)(φ(K)ᵀ1) of φ(Q), φ(K) and V, all (B, heads, N, D), over all tokens: linear in their number.

    In bfloat16 the products take and give bfloat16 and add up in float32; in any other dtype all of it is float32.
    """
    dtype = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32  # sums would overflow float16
    with without_autocast(query.device):
        # one head after the other in memory: else each product would copy its operands to have it so
        query, key, value = (part.to(dtype).contiguous() for part in (query, key, value))
        # Means over tokens, not sums: ε weighs the same on every map.
        summary = key.transpose(-1, -2) @ value / key.shape[-2]  # (B, heads, D, D)
        weight = query @ key.mean(-2).unsqueeze(-1)  # (B, heads, N, 1)
        return query @ summary / (weight + 1e-6)


class WindowAttentionMixer(AttentionMixer):
    """Softmax attention inside windows of 8 × 8 tokens, as Swin's (arXiv 2103.14030, section 3.2).

    In every other layer of a model the windows are shifted by half their side, along each axis that is longer than a
    window, so that what one layer keeps apart meets in the next. A window at the border is what the map leaves of it.
    There is no position bias: the parameters are those of :class:`AttentionMixer`.

    Args:
        width, num_groups, projections: As :class:`Mixer`.
        shifted: Whether the windows are shifted.
    """

    def __init__(
        self, width: int, num_groups: int, projections: Projections | None = None, shifted: bool = False
    ) -> None:
        super().__init__(width, num_groups, projections)
        self.shifted = shifted

    @classmethod
    def of_layer(cls, layer: int, width: int, num_groups: int, projections: Projections | None = None) -> Mixer:
        return cls(width, num_groups, projections, shifted=layer % 2 == 1)

    def mix(self, value: Tensor) -> Tensor:
        query, key = self.query_key(value).chunk(2, dim=-1)
        down, across = (WindowAxis(length, self.shifted) for length in value.shape[1:3])
        parts = [self.windows(part, down, across) for part in (query, key, value)]
        mixed: list[tuple[slice, slice, Tensor]] = []
        for rows, columns in (down.uncut, across.uncut), (down.uncut, across.cut), (down.cut, slice(None)):
            some = [part[:, rows, columns] for part in parts]
            if some[0].numel():  # most windows of a large map are uncut, and need no mask
                uncut = (rows, columns) == (down.uncut, across.uncut)
                mask = None if uncut else visible(down.pieces(value.device)[rows], across.pieces(value.device)[columns])
                mixed.append((rows, columns, self.attend_windows(some, mask)))
        y = mixed[0][-1].new_empty(len(value), down.padded, across.padded, value.shape[-1])
        for rows, columns, part in mixed:
            self.split(y, down, across)[:, rows, columns] = part
        return across.back(down.back(y, 1), 2)

    def attend_windows(self, windows: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """Attention in windows (B, rows, columns, heads, WINDOW, WINDOW, D) by a mask (rows, columns, N, N) or none."""
        query, key, value = (part.flatten(0, 2).flatten(2, 3) for part in windows)  # (windows, heads, N, D)
        if mask is not None:
            mask = mask.expand(len(windows[0]), -1, -1, -1, -1).flatten(0, 2).unsqueeze(1)  # (windows, 1, N, N)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return y.unflatten(2, (WINDOW, WINDOW)).unflatten(0, windows[0].shape[:3])

    def windows(self, x: Tensor, down: WindowAxis, across: WindowAxis) -> Tensor:
        """A map (B, H, W, C) as windows of heads, (B, rows, columns, heads, WINDOW, WINDOW, D)."""
        return self.split(across.forth(down.forth(x, 1), 2), down, across)

    def split(self, x: Tensor, down: WindowAxis, across: WindowAxis) -> Tensor:
        """The view of a padded map as windows of heads."""
        shape = (down.windows, WINDOW, across.windows, WINDOW, -1, self.head_width)
        return x.view(len(x), *shape).permute(0, 1, 3, 5, 2, 4, 6)


@dataclass(frozen=True)
class WindowAxis:
    """How windows lie along one axis of a map: it is padded to a multiple of their side and, if shifted, goes around.

    A window that is shifted past the end holds the tokens of the start, too, which a mask keeps from each other.

    Args:
        length: Tokens of the axis.
        shifted: Whether it is shifted, if it is longer than a window.
    """

    length: int
    shifted: bool

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return -(-self.length // WINDOW)

    @property
    def padded(self) -> int:
        """Tokens of the axis with its padding."""
        return WINDOW * self.windows

    @property
    def shift(self) -> int:
        """Tokens by which the windows are shifted."""
        return WINDOW // 2 if self.shifted and self.length > WINDOW else 0

    @property
    def uncut(self) -> slice:
        """The windows that are full of tokens that are neighbours."""
        return slice((self.length - self.shift) // WINDOW)

    @property
    def cut(self) -> slice:
        """The others, which come last."""
        return slice(self.uncut.stop, None)

    def forth(self, x: Tensor, dim: int) -> Tensor:
        """The padded and shifted axis `dim` of a map (B, H, W, C)."""
        if self.padded > self.length:
            x = F.pad(x, (0, 0) * (3 - dim) + (0, self.padded - self.length))
        return x.roll(-self.shift, dim) if self.shift else x

    def back(self, x: Tensor, dim: int) -> Tensor:
        """What :meth:`forth` was given, of what it gave."""
        return (x.roll(self.shift, dim) if self.shift else x).narrow(dim, 0, self.length)

    def pieces(self, device: torch.device) -> Tensor:
        """Which of its window's tokens belong together, (windows, WINDOW): 0, 1 beyond the axis' end, 2 for padding."""
        place = torch.arange(self.padded, device=device) + self.shift
        return torch.where(place % self.padded < self.length, place // self.padded, 2).unflatten(0, (-1, WINDOW))


def visible(rows: Tensor, columns: Tensor) -> Tensor:
    """Which tokens of windows see each other, (rows, columns, N, N), by their pieces along both axes (…, WINDOW)."""
    down, across = (pieces[:, :, None] == pieces[:, None, :] for pieces in (rows, columns))
    both = down[:, None, :, None, :, None] & across[None, :, None, :, None, :]  # (rows, columns, y, x, y', x')
    return both.flatten(4, 5).flatten(2, 3)


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
    "window": WindowAttentionMixer,
    "conv": ConvMixer,
}
