"""What stands in the place of a U-Net's self-attention, under its name and with its calls.

Each is called as `attn1` of diffusers' BasicTransformerBlock is: layer(hidden_states (B, N, C)) → (B, N, C). The N
tokens are the rows of a map of H × W, one after the other, and (H, W) is the layer's `size`: whoever calls the layer
sets it first. :class:`gspn_dit.models.attention_replacement.AttentionReplacement` does so in a U-Net.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    AttnProcessorNPU,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    XLAFlashAttnProcessor2_0,
)
from torch import Tensor, nn

from gspn_dit.errors import InputError
from gspn_dit.layers.chunks import Chunk
from gspn_dit.layers.mixers import GSPNMixer, Projections
from gspn_dit.layers.query_key_value import GSPNMixing, LinearMixing, QueryKeyValueMixing, WindowMixing

SAME_RESULT = (  # processors that differ in how they compute softmax(QKᵀ)V, and in nothing else
    AttnProcessor,
    AttnProcessor2_0,
    AttnProcessorNPU,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    XLAFlashAttnProcessor2_0,
)


class TokensOfMap:
    """Tokens (B, N, C) of a map whose size is set beforehand.

    Attributes:
        size: (H, W) of the map.
        chunk: What the layer's scans run over, or how far it looks.
        keeps_projections: Whether it has the projections of the attention that it replaces.
        sees_chunk: Whether the chunk has an effect.
    """

    size: tuple[int, int] | None = None
    chunk: Chunk = None
    keeps_projections: ClassVar[bool] = True
    sees_chunk: ClassVar[bool] = True

    def as_map(self, tokens: Tensor, encoder_hidden_states: object, attention_mask: object) -> Tensor:
        """The tokens as a map (B, H, W, C), if nothing else than a map's self-attention is asked for."""
        if encoder_hidden_states is not None:
            raise InputError(
                f"a {type(self).__name__} is self-attention", argument="encoder_hidden_states", remedy="leave it out"
            )
        if attention_mask is not None:
            raise InputError(
                f"a {type(self).__name__} has no pairs of tokens to mask",
                argument="attention_mask",
                remedy="leave it out, or unmount the replacement",
            )
        if self.size is None or tokens.dim() != 3 or tokens.shape[1] != self.size[0] * self.size[1]:
            raise InputError(
                f"tokens of shape {tuple(tokens.shape)}",
                argument="size",
                value=self.size,
                wanted="(H, W) of the map that the tokens (B, H · W, C) are",
                remedy="set the layer's size before the call; in a U-Net that it is mounted on this is done",
            )
        return tokens.unflatten(1, self.size)


class ReplacedAttention(TokensOfMap, Attention):
    """A self-attention with its own projections `to_q`, `to_k`, `to_v` and `to_out`, and another way to mix tokens.

    It is diffusers' `Attention` by type, names and shapes, so what looks for those finds them: LoRA files, IP-Adapter's
    processors, `fuse_qkv_projections`. A processor says how softmax attention is computed, which has no meaning here:
    those of diffusers that change the result are refused, and the others have no effect.

    Args:
        channels: Channels C of a token.
        heads: Heads, a divisor of C.
        chunk: What the mixing takes as its chunk.
        bias, out_bias, dropout: Whether `to_q`, `to_k` and `to_v`, and whether `to_out` have a bias, and the dropout
            after it.
    """

    mixing_class: ClassVar[type[QueryKeyValueMixing]]
    mixing: QueryKeyValueMixing

    def __init__(
        self,
        channels: int,
        heads: int,
        chunk: Chunk = None,
        bias: bool = False,
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            channels, heads=heads, dim_head=channels // heads, dropout=dropout, bias=bias, out_bias=out_bias
        )
        self.chunk = chunk
        self.mixing = self.mixing_class(channels, heads)

    def set_processor(self, processor: Any) -> None:
        """As diffusers', but for processors that compute something else than softmax attention.

        Raises:
            InputError: Another processor, such as one of perturbed-attention guidance.
        """
        if type(processor) not in SAME_RESULT:  # a subclass may compute anything
            raise InputError(
                f"a {type(self).__name__} is no softmax attention that {type(processor).__name__} could compute",
                argument="processor",
                remedy="keep attention in this layer (keep_attention), or leave its processor as it is",
            )
        super().set_processor(processor)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        x = self.as_map(hidden_states, encoder_hidden_states, attention_mask)
        if isinstance(self.processor, FusedAttnProcessor2_0) and self.mixing.shares_input:
            query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        else:
            for_query, for_key = self.mixing.inputs(x)
            query, key, value = self.to_q(for_query), self.to_k(for_key), self.to_v(x)
        y = self.mixing(x, query, key, value, self.chunk).flatten(1, 2)
        for layer in self.to_out:  # the projection and its dropout
            y = layer(y)
        return y


class GSPNAttention(ReplacedAttention):
    """Line scans of V whose gates come from K and Q: :class:`gspn_dit.layers.query_key_value.GSPNMixing`."""

    mixing_class = GSPNMixing


class LinearAttention(ReplacedAttention):
    """Linear attention of LinFusion's kind: :class:`gspn_dit.layers.query_key_value.LinearMixing`."""

    mixing_class = LinearMixing
    sees_chunk = False


class WindowAttention(ReplacedAttention):
    """Attention to the neighbourhood, of CLEAR's kind: :class:`gspn_dit.layers.query_key_value.WindowMixing`."""

    mixing_class = WindowMixing


class FreshAttention(TokensOfMap, nn.Module):
    """A new mixer of line scans in place of the attention, of about half its parameters: nothing of it is kept.

    It is :class:`gspn_dit.layers.mixers.GSPNMixer` with its projections, whose output starts at zero: to begin with,
    the network is as it would be without this attention.

    Args:
        channels, heads, chunk: As :class:`ReplacedAttention`'s.
        bias, out_bias, dropout: Of the attention that it replaces; without effect but for the dropout.
    """

    keeps_projections = False

    def __init__(
        self,
        channels: int,
        heads: int,
        chunk: Chunk = None,
        bias: bool = False,
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.mixer = GSPNMixer(channels, heads, Projections())
        nn.init.zeros_(self.mixer.proj.weight)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        x = self.as_map(hidden_states, encoder_hidden_states, attention_mask)
        return self.dropout(self.mixer(x, self.chunk).flatten(1, 2))


REPLACEMENTS: dict[str, type[ReplacedAttention] | type[FreshAttention]] = {
    "gspn": GSPNAttention,
    "fresh": FreshAttention,
    "linear": LinearAttention,
    "window": WindowAttention,
}
