"""`propagate`: GSPN line scans in up to four directions, one differentiable operator over interchangeable kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gspn_dit.errors import InputError
from gspn_dit.ops import backends
from gspn_dit.ops.reference import DIRECTIONS

ALL_DIRECTIONS = tuple(DIRECTIONS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def propagate(
    x: Tensor,
    gates: Tensor,
    lam: Tensor,
    out: Tensor | None = None,
    *,
    decay: Tensor | None = None,
    scale: Tensor | None = None,
    chunk: int | None = None,
    directions: Sequence[str] = ALL_DIRECTIONS,
    backend: str | None = None,
) -> Tensor:
    r"""Scan a map line by line in every direction and add up what the scans carry (GSPN, arXiv 2501.12381).

    For "down", line i is row i and position j runs along it:

    .. math:: h_{i,j} = f (w^-_{i,j} h_{i-1,j-1} + w^0_{i,j} h_{i-1,j} + w^+_{i,j} h_{i-1,j+1})
              + \lambda_{i,j} x_{i,j}

    with :math:`(w^-, w^0, w^+)` the sigmoids of three logits divided by their sum over the neighbours inside the map.
    "up", "right", "left" are the same over reversed rows, columns, reversed columns; y = Σ_k s_k ⊙ u_k ⊙ h_k. Every
    argument is indexed in map coordinates for every direction. G groups of C // G channels share gates; f and s are
    numbers a channel and direction, the same at all sites. Scans are stable for |f| ≤ 1.

    Args:
        x: (B, H, W, C) values; float32, bfloat16 or float16 (float64 on the CPU).
        gates: (B, H, W, K, 3, G) raw logits of the neighbours (-1, 0, +1) along the line, K = len(directions).
        lam: (B, H, W, K, G) input gate λ.
        out: (B, H, W, K, G) output gate u, or None for 1.
        decay: (K, C) f, what is left of a line on the next one, or None for 1. float32 whatever x's dtype, since f is
            close to 1 (float64 where x is).
        scale: (K, C) s, of the dtype of decay, or None for 1.
        chunk: None scans the whole map; n makes lines [0, n), [n, 2n), ... of the map independent of each other.
        directions: Which scans, each at most once, in the order of the K axis.
        backend: "reference", "cpu" or "cuda"; None takes the best that is available for x's device.

    Returns:
        (B, H, W, C) in x's dtype and memory layout. The strides of the inputs are free; sums are held in float32 at
        least.

    Raises:
        InputError: (a ValueError) a wrong shape, dtype, device, chunk, direction or backend, naming the argument.
    """
    _check(x, gates, lam, out, decay, scale, chunk, directions)
    if backend is not None and backend not in backends.BACKENDS:
        raise InputError(f"backend={backend!r}: wanted None or one of {backends.BACKENDS}")
    codes = [ALL_DIRECTIONS.index(direction) for direction in directions]
    return _propagate(x, gates, lam, out, decay, scale, chunk or 0, codes, backend or "")


def _check(
    x: Tensor,
    gates: Tensor,
    lam: Tensor,
    out: Tensor | None,
    decay: Tensor | None,
    scale: Tensor | None,
    chunk: int | None,
    directions: Sequence[str],
) -> None:
    unknown = [d for d in directions if d not in DIRECTIONS]
    if isinstance(directions, str) or unknown or not directions or len(set(directions)) < len(directions):
        raise InputError(f"directions={directions!r}: wanted one or more of {ALL_DIRECTIONS}, each at most once")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"chunk={chunk!r}: wanted None (global) or a whole number of lines, 1 or more")
    if x.dim() != 4 or 0 in x.shape:
        raise InputError(f"x has shape {tuple(x.shape)}: wanted (B, H, W, C), none of them 0")
    if x.dtype not in DTYPES and not (x.dtype == torch.float64 and x.device.type == "cpu"):
        raise InputError(f"x has dtype {x.dtype} on {x.device}: wanted one of {DTYPES}, or float64 on the CPU")
    if lam.dim() != 5 or lam.shape[-1] < 1 or x.shape[-1] % lam.shape[-1]:
        raise InputError(
            f"lam has shape {tuple(lam.shape)}: wanted (B, H, W, K, G) with G dividing the {x.shape[-1]} channels of x"
        )
    sites, k, groups = tuple(x.shape[:3]), len(directions), lam.shape[-1]
    of_a_channel = torch.promote_types(x.dtype, torch.float32)
    wanted = {
        "gates": (gates, (*sites, k, 3, groups), x.dtype),
        "lam": (lam, (*sites, k, groups), x.dtype),
        "out": (out, (*sites, k, groups), x.dtype),
        "decay": (decay, (k, x.shape[-1]), of_a_channel),
        "scale": (scale, (k, x.shape[-1]), of_a_channel),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None and name not in ("gates", "lam"):
            continue
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}: wanted {shape} for x of shape {tuple(x.shape)}, "
                f"{k} directions and {groups} groups"
            )
        if tensor.dtype != dtype:
            raise InputError(f"{name} has dtype {tensor.dtype}: wanted {dtype} for x of {x.dtype}; cast it")
        if tensor.device != x.device:
            raise InputError(f"{name} is on {tensor.device}: wanted x's device, {x.device}; move one of them")


# Below: the operator as torch.library sees it. chunk 0 is global; directions are indices into ALL_DIRECTIONS; backend
# "" is chosen, and built if need be, when the operator runs.


@torch.library.custom_op("gspn_dit::propagate", mutates_args=())
def _propagate(
    x: Tensor,
    gates: Tensor,
    lam: Tensor,
    out: Tensor | None,
    decay: Tensor | None,
    scale: Tensor | None,
    chunk: int,
    directions: Sequence[int],
    backend: str,
) -> Tensor:
    return backends.kernel(backend, x.device).forward(x, gates, lam, out, decay, scale, chunk, directions)


@_propagate.register_fake
def _(x, gates, lam, out, decay, scale, chunk, directions, backend):
    return torch.empty_like(x)


@torch.library.custom_op("gspn_dit::propagate_backward", mutates_args=())
def _propagate_backward(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    lam: Tensor,
    out: Tensor | None,
    decay: Tensor | None,
    scale: Tensor | None,
    chunk: int,
    directions: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gates, lam, out, decay and scale; empty where one of the last three is None."""
    return backends.kernel(backend, x.device).backward(grad, x, gates, lam, out, decay, scale, chunk, directions)


@_propagate_backward.register_fake
def _(grad, x, gates, lam, out, decay, scale, chunk, directions, backend):
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in (x, gates, lam, out, decay, scale))


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.chunk, ctx.directions, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    tensors = ctx.saved_tensors
    grads = _propagate_backward(grad, *tensors, ctx.chunk, ctx.directions, ctx.backend)
    present = [None if tensor is None else g for tensor, g in zip(tensors, grads, strict=True)]
    return *present, None, None, None


_propagate.register_autograd(_backward, setup_context=_save_for_backward)
