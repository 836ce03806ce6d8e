"""Attention of a map's tokens to those of a text, whose number does not grow with the map."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.layers.linear import linear
from gspn_dit.layers.norm import EPSILON, without_autocast


class CrossAttention(nn.Module):
    """Softmax attention in heads of 64 channels, queries from x and keys and values from a text.

    (B, …, C), a text (B, L, D) and its mask (B, L) to (B, …, C). With x itself for the text it is self-attention.
    Queries and keys are normalised over the channels of a head (QK-norm, arXiv 2302.05442, section 2), so that products
    stay small in bfloat16. Tokens where the mask is false are not seen, but for the first, which always is: a text
    without a token would leave nothing to attend to.

    Args:
        width: Channels C.
        text_width: Channels D of the text's tokens.
    """

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.head_width = math.gcd(width, 64)
        self.query, self.key_value = linear(width, width), linear(text_width, 2 * width)
        self.query_norm, self.key_norm = HeadNorm(self.head_width), HeadNorm(self.head_width)
        self.proj = linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        key, value = map(self.heads, self.key_value(text).chunk(2, dim=-1))  # (B, heads, L, D) each
        query = self.heads(self.query(x).flatten(1, -2))  # (B, heads, N, D)
        first = torch.arange(mask.shape[-1], device=mask.device) == 0
        y = F.scaled_dot_product_attention(
            self.query_norm(query), self.key_norm(key), value, attn_mask=(mask.bool() | first)[:, None, None]
        )
        return self.proj(y.transpose(1, 2).reshape(x.shape))

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, C) as heads (B, heads, N, D)."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class HeadNorm(nn.Module):
    """x over its root mean square, times a weight per channel, in x's dtype: (…, D) to (…, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), EPSILON)
