"""`propagate`: GSPN line scans in up to four directions, one differentiable operator over interchangeable backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_type_hints

import torch
from torch import Tensor

from gspn_dit.errors import InputError, is_whole
from gspn_dit.ops.backend import OPERANDS, OPTIONS, Call, FusesTail
from gspn_dit.ops.reference import DIRECTIONS
from gspn_dit.ops.registry import choose, find
from gspn_dit.ops.tail import apply_tail, tail_backward

ALL_DIRECTIONS = tuple(DIRECTIONS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def propagate(
    x: Tensor,
    gates: Tensor,
    input_gate: Tensor,
    output_gate: Tensor | None = None,
    *,
    decay: Tensor | None = None,
    scale: Tensor | None = None,
    direct: Tensor | None = None,
    chunk: int | None = None,
    window: int | None = None,
    shift: int = 0,
    directions: Sequence[str] = ALL_DIRECTIONS,
    backend: str | None = None,
) -> Tensor:
    """Scan a map of tokens line by line in up to four directions and sum the scans (GSPN, arXiv 2501.12381).

    The map has H rows and W columns of tokens, each of C channels. A line is a row for the directions "down" (first row
    first) and "up" (last row first), and a column for "right" and "left". Each scan computes one line from the line
    before it. With i the line, j the position in it and i - 1 the line before:

        h[i, j] = f (w₋[i, j] h[i-1, j-1] + w₀[i, j] h[i-1, j] + w₊[i, j] h[i-1, j+1]) + λ[i, j] x[i, j]
        y = Σ_k s_k u_k h_k

    - x: the values, and h: what a scan holds at each token; h is 0 before the first line of a chunk or window.
    - w₋, w₀, w₊: weights of the three neighbours on the line before. They are the sigmoids of three logits, divided by
      the sum of those whose neighbour is inside the map, and the window, so they sum to 1.
    - λ: the input gate, and u: the output gate, a number per token, direction and group.
    - f: the decay, and s: the scale, a number per channel and direction, the same for all tokens.
    - k: the direction; y: the result.

    With `direct`, the sum is normalised and the values are added:

        y = norm(Σ_k s_k u_k h_k) + d x

    - norm: divides the channels of a group by their root mean square, 1 / √(mean square + 1e-6) (arXiv 1910.07467).
    - d: the direct path, a number per channel.

    The norm reads the sum in x's dtype; y is rounded once.

    The C channels are G groups of C // G; the channels of a group share w, λ and u. All operands are indexed by row and
    column of the map, whatever the direction. Scans are stable for |f| ≤ 1. docs/operator.md shows a scan and explains
    the terms.

    Args:
        x: (B, H, W, C) values; float32, bfloat16 or float16 (float64 on the CPU).
        gates: (B, H, W, K, 3, G) logits of the neighbours (-1, 0, +1) along the line, K = len(directions).
        input_gate: (B, H, W, K, G) λ.
        output_gate: (B, H, W, K, G) u, or None for 1.
        decay: (K, C) f, the part of a line that reaches the next line, or None for 1. float32 whatever x's dtype, since
            f is close to 1 (float64 where x is).
        scale: (K, C) s, of the dtype of decay, or None for 1.
        direct: (C,) d, of the dtype of decay, or None for the sum alone.
        chunk: None scans the whole map; n makes lines [0, n), [n, 2n), ... of the map independent of each other.
        window: n cuts the map into windows of n × n tokens, smaller at its edges, each scanned as a map of its own; not
            beside a chunk. An axis of at most n tokens is one window.
        shift: Row and column of the first border between windows, 0 … window - 1; 0 begins with a whole window.
        directions: Which scans, each at most once, in the order of the K axis.
        backend: A name that `gspn-dit ops` lists, such as "reference", "native-cpu" or "native-cuda"; None takes the
            first by priority that can run the call.

    Returns:
        y, (B, H, W, C), in x's dtype and memory layout. The strides of the operands are free; sums are held in float32
        at least.

    Raises:
        InputError: (a ValueError) a wrong shape, dtype, device, chunk, window, shift, direction or backend, naming the
            argument; or a named backend that cannot run the call, and why.
    """
    _check_options(chunk, window, shift, directions)
    codes = [ALL_DIRECTIONS.index(direction) for direction in directions]
    call = Call(x, gates, input_gate, output_gate, decay, scale, chunk or 0, window or 0, shift, codes)
    _check_operands(call, direct)
    if backend is not None:
        find(backend)
    return _propagate(*call, direct, backend or "")[0]


def _check_options(chunk: int | None, window: int | None, shift: int, directions: Sequence[str]) -> None:
    unknown = [d for d in directions if d not in DIRECTIONS]
    if isinstance(directions, str) or unknown or not directions or len(set(directions)) < len(directions):
        raise InputError(
            argument="directions", value=directions, wanted=f"one or more of {ALL_DIRECTIONS}, each at most once"
        )
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise InputError(argument="chunk", value=chunk, wanted="None (global) or a whole number of lines, 1 or more")
    if window is not None and (not is_whole(window) or window < 1):
        raise InputError(argument="window", value=window, wanted="None or a whole number of tokens, 1 or more")
    if window is not None and chunk is not None:
        raise InputError(f"there is a chunk={chunk} too", argument="window", value=window, remedy="give one of both")
    if not is_whole(shift) or not 0 <= shift < (window or 1):
        wanted = "0 without a window" if window is None else f"a whole number from 0, below window={window}"
        raise InputError(argument="shift", value=shift, wanted=wanted)


def _check_operands(call: Call, direct: Tensor | None) -> None:
    x, input_gate = call.x, call.input_gate
    if x.dim() != 4 or 0 in x.shape:
        raise InputError(f"shape {tuple(x.shape)}", argument="x", wanted="(B, H, W, C), none of them 0")
    if x.dtype not in DTYPES and not (x.dtype == torch.float64 and x.device.type == "cpu"):
        raise InputError(
            f"dtype {x.dtype} on {x.device}", argument="x", wanted=f"one of {DTYPES}, or float64 on the CPU"
        )
    if input_gate.dim() != 5 or input_gate.shape[-1] < 1 or x.shape[-1] % input_gate.shape[-1]:
        raise InputError(
            f"shape {tuple(input_gate.shape)}",
            argument="input_gate",
            wanted=f"(B, H, W, K, G) with G dividing the {x.shape[-1]} channels of x",
        )
    tokens, k, groups = tuple(x.shape[:3]), len(call.directions), input_gate.shape[-1]
    of_a_channel = torch.promote_types(x.dtype, torch.float32)
    wanted = {
        "gates": (call.gates, (*tokens, k, 3, groups), x.dtype),
        "input_gate": (input_gate, (*tokens, k, groups), x.dtype),
        "output_gate": (call.output_gate, (*tokens, k, groups), x.dtype),
        "decay": (call.decay, (k, x.shape[-1]), of_a_channel),
        "scale": (call.scale, (k, x.shape[-1]), of_a_channel),
        "direct": (direct, (x.shape[-1],), of_a_channel),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            if name in ("gates", "input_gate"):
                raise TypeError(f"{name} is None: wanted a tensor")
            continue
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"shape {tuple(tensor.shape)}",
                argument=name,
                wanted=f"{shape} for x of shape {tuple(x.shape)}, {k} directions and {groups} groups",
            )
        if tensor.dtype != dtype:
            raise InputError(
                f"dtype {tensor.dtype}", argument=name, wanted=f"{dtype} for x of {x.dtype}", remedy="cast it"
            )
        if tensor.device != x.device:
            raise InputError(
                f"on {tensor.device}", argument=name, wanted=f"x's device, {x.device}", remedy="move one of them"
            )


# Below: the operator as torch.library sees it, with the fields of Call as its arguments, then `direct` and `backend`.
# That is "" where the backend is chosen, and built if need be, when the operator runs. It returns y and r = 1 / rms,
# (B, H, W, G), which the tail's backward pass needs; r is empty where there is no tail.

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", Sequence[int]: "SymInt[]"}
_CALL = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(Call).items())
_ARGUMENTS = f"{_CALL}, Tensor? direct, str backend"
_GRADS = ", ".join("Tensor" for _ in (*OPERANDS, "direct"))


def _new_inverse_rms(call: Call, direct: Tensor | None) -> Tensor:
    """r before it is computed."""
    of_groups = (*call.x.shape[:3], call.input_gate.shape[-1])
    dtype = torch.promote_types(call.x.dtype, torch.float32)
    return call.x.new_empty((0,) if direct is None else of_groups, dtype=dtype)


@torch.library.custom_op("gspn_dit::propagate", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def _propagate(*arguments) -> tuple[Tensor, Tensor]:
    *fields, direct, name = arguments
    call = Call._make(fields)
    backend = choose(call, name)
    if direct is None:
        return backend.forward(call), _new_inverse_rms(call, direct)
    if isinstance(backend, FusesTail) and backend.supports_tail(call):
        return backend.forward_with_tail(call, direct)
    return apply_tail(backend.forward(call), call.x, direct, call.input_gate.shape[-1])


@_propagate.register_fake
def _(*arguments):
    *fields, direct, _ = arguments
    call = Call._make(fields)
    return torch.empty_like(call.x), _new_inverse_rms(call, direct)


@torch.library.custom_op(
    "gspn_dit::propagate_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? y, Tensor inverse_rms, {_ARGUMENTS}) -> ({_GRADS})",
)
def _propagate_backward(grad, y, inverse_rms, *arguments) -> tuple[Tensor, ...]:
    """Gradients of the operands and of direct; empty where one is None. y is None where there is no tail."""
    *fields, direct, name = arguments
    call = Call._make(fields)
    backend = choose(call, name, backward=True)
    if direct is None:
        return *backend.backward(grad, call), call.x.new_empty(0)
    if isinstance(backend, FusesTail) and backend.supports_tail(call, backward=True):
        return backend.backward_with_tail(grad, y, inverse_rms, call, direct)
    grad_scanned, grad_direct = tail_backward(grad, y, inverse_rms, call.x, direct)
    grad_x, *others = backend.backward(grad_scanned, call)
    return grad_x.addcmul_(direct, grad), *others, grad_direct


@_propagate_backward.register_fake
def _(grad, y, inverse_rms, *arguments):
    *fields, direct, _ = arguments
    x, *others = Call._make(fields).operands
    return tuple(x.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in (x, *others, direct))


def _save_for_backward(ctx, inputs, output) -> None:
    *fields, direct, ctx.backend = inputs
    call = Call._make(fields)
    y, inverse_rms = output
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)  # no zeros for inverse_rms
    ctx.options = call.options
    ctx.save_for_backward(*call.operands, direct, None if direct is None else y, inverse_rms)


def _backward(ctx, grad: Tensor | None, _):
    if grad is None:  # of a result that takes no part
        return (None,) * (len(OPERANDS) + len(OPTIONS) + 2)
    *operands, direct, y, inverse_rms = ctx.saved_tensors
    *grads, grad_direct = _propagate_backward(grad, y, inverse_rms, *operands, *ctx.options, direct, ctx.backend)
    present = [None if operand is None else g for operand, g in zip(operands, grads, strict=True)]
    return *present, *(None for _ in OPTIONS), None if direct is None else grad_direct, None


_propagate.register_autograd(_backward, setup_context=_save_for_backward)
