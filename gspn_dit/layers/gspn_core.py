"""The scan of the GSPN paper (arXiv 2501.12381), with gates for every channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.layers.linear import linear
from gspn_dit.ops import propagate
from gspn_dit.ops.reference import DIRECTIONS

NUM_DIRECTIONS = len(DIRECTIONS)


class GSPNCore(nn.Module):
    """Line scans in four directions with gates for every channel, (B, H, W, C) to (B, H, W, C).

    y = Σ_k s_k (u_k ⊙ h_k + D_k ⊙ x) over the directions k, where h_k is the scan of x, and the gates' logits, the
    input gate λ, the output gate u and the skip D are linear in a proxy of few channels (arXiv 2501.12381). s_k is one
    number per direction.

    Called as core(x, chunk=None); a chunk is the number of lines that a scan runs over, None the whole map.

    Args:
        width: Channels C.
        rank: Channels of the proxy; None takes C // 16.
    """

    def __init__(self, width: int, rank: int | None = None) -> None:
        super().__init__()
        rank = max(width // 16, 1) if rank is None else rank
        self.proxy = linear(width, rank, bias=False)
        # Xavier's bound goes by the wide output, so λ, u and D start small and so does the block's branch. Variance
        # preserving weights here, whose products are large and random, kept a small network from learning at all.
        self.gates = linear(rank, NUM_DIRECTIONS * 3 * width, bias=False)
        self.lam = linear(rank, NUM_DIRECTIONS * width, bias=False)  # input gate λ; saved models have it as `lam`
        self.out = linear(rank, NUM_DIRECTIONS * width, bias=False)  # output gate u; saved models have it as `out`
        self.skip = linear(rank, NUM_DIRECTIONS * width, bias=False)
        self.merge = nn.Parameter(torch.ones(NUM_DIRECTIONS))

    def forward(self, x: Tensor, chunk: int | None = None) -> Tensor:
        proxy = self.proxy(x)
        # Channels come innermost from the linear layers: the logical shape is the memory order that coalesces.
        gates = self.gates(proxy).unflatten(-1, (NUM_DIRECTIONS, 3, -1))
        input_gate = self.lam(proxy).unflatten(-1, (NUM_DIRECTIONS, -1))
        # s_k goes into the weights of u and D, which takes the sum over k of D out of the map altogether.
        output_weight = self.out.weight.unflatten(0, (NUM_DIRECTIONS, -1)) * self.merge[:, None, None]
        skip_weight = self.skip.weight.unflatten(0, (NUM_DIRECTIONS, -1)) * self.merge[:, None, None]
        output_gate = F.linear(proxy, output_weight.flatten(0, 1)).unflatten(-1, (NUM_DIRECTIONS, -1))
        skip = F.linear(proxy, skip_weight.sum(0))
        y = propagate(x, gates.to(x.dtype), input_gate.to(x.dtype), output_gate.to(x.dtype), chunk=chunk)
        return y + skip * x
