"""The tail of `propagate`, in plain PyTorch: what is done with the sum of the scans where `direct` is given.

    y = norm(m) + d ⊙ x,   m = Σ_k s_k u_k h_k

norm divides each group's channels by their root mean square (arXiv 1910.07467); d is a number per channel and x the
value that is scanned. m is read as the scans leave it, in x's dtype; a kernel may read its sums before that rounding,
which is all the difference. From there on everything is in float32, float64 for float64, and y is rounded once.

The backward pass needs y, x and r = 1 / rms of each token and group: norm(m) is y - d ⊙ x. So nothing of the map's size
is kept for it beyond the input and the output. It has norm(m) to within y's rounding, which is coarse beside norm(m)
only where |d x| is large beside 1.

This is the definition, and what runs where a backend has no tail of its own (:class:`gspn_dit.ops.backend.FusesTail`).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6  # added to the mean square, so that a group of zeros stays zero; csrc/problem.h has the same


def apply_tail(scanned: Tensor, x: Tensor, direct: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """y, (B, H, W, C), and r, (B, H, W, G) in direct's dtype, of the sum of the scans m, whose memory becomes y's."""
    groups = scanned.unflatten(-1, (num_groups, -1))
    mean_square = torch.linalg.vector_norm(groups, dim=-1, dtype=direct.dtype).square_().div_(groups.shape[-1])
    inverse_rms = mean_square.add_(EPSILON).rsqrt_().contiguous()
    if scanned.dtype == direct.dtype:
        groups.mul_(inverse_rms.unsqueeze(-1))
        return scanned.addcmul_(direct, x), inverse_rms
    normed = (groups * inverse_rms.unsqueeze(-1)).flatten(-2)
    return scanned.copy_(normed.addcmul_(direct, x)), inverse_rms


def tail_backward(grad: Tensor, y: Tensor, inverse_rms: Tensor, x: Tensor, direct: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of m, (B, H, W, C) in x's dtype, and of d, for the gradient of y.

    That of x is d ⊙ grad here, and what comes through the scans besides.
    """
    num_groups, exact = inverse_rms.shape[-1], grad.to(direct.dtype)
    grad_direct = (exact * x).sum((0, 1, 2))
    normed = torch.addcmul(y, direct, x, value=-1).unflatten(-1, (num_groups, -1))
    groups = exact.unflatten(-1, (num_groups, -1))
    radial = (groups * normed).mean(-1, keepdim=True)  # along norm(m), a change of m changes nothing
    grad_scanned = torch.addcmul(groups, normed, radial, value=-1).mul_(inverse_rms.unsqueeze(-1))
    return grad_scanned.flatten(-2).to(x.dtype), grad_direct
