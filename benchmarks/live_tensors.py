"""The bytes of a forward's tensors at its peak, computed on the meta device: nothing is allocated, so any size will do.

Counted is what PyTorch's allocator would be asked for: every tensor from the call that makes it to the moment that
Python lets go of it. Not counted are weights, what was there before, and what kernels take for themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """In the block, tensors that are made are counted for as long as they live.

    Attributes:
        peak: Bytes of those that lived together, at the most.
        largest: Elements of the largest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        out = func(*args, **kwargs or {})
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and id(each.untyped_storage()) not in given | self._known:
                self._count(each)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, tensor.numel())

        def let_go() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, let_go)


class FlashAttention(TorchFunctionMode):
    """In the block, softmax attention keeps its output alone, as flash attention does; no pairs of tokens."""

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            query = args[0] if args else (kwargs or {})["query"]
            return torch.empty_like(query)
        return func(*args, **kwargs or {})


@dataclass(frozen=True)
class Parked:
    """What is left of a tensor that waits elsewhere: it takes no memory here."""

    shape: torch.Size
    dtype: torch.dtype


def park(tensor: Tensor) -> Parked:
    """Let a tensor wait elsewhere."""
    return Parked(tensor.shape, tensor.dtype)


def unpark(parked: Parked, device: torch.device) -> Tensor:
    """The tensor again."""
    return torch.empty(parked.shape, dtype=parked.dtype, device=device)
