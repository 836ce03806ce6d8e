"""Linear layers with the initialisation of DiT."""

from __future__ import annotations

from torch import nn


def linear(fan_in: int, fan_out: int, bias: bool = True, zero: bool = False) -> nn.Linear:
    """A linear layer that starts at zero, or as DiT's: weights Xavier-uniform, bias zero."""
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
