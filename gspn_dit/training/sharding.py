"""Tensors that FSDP2 may have split over the processes, as one piece and back. Plain tensors pass through."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory; for a block without gradients."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor in one piece, on every process; all of them call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def copy_full(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor, each process its own part of it; nothing is sent between them."""
    local_tensor(tensor).copy_(_part(value.to(tensor.device), tensor))


def sharded_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole value split, placed and typed as another tensor is, for its optimiser state."""
    return _distributed(value.to(tensor), tensor) if isinstance(tensor, DTensor) else value.to(tensor)


def _part(value: Tensor, tensor: Tensor) -> Tensor:
    return _distributed(value, tensor).to_local() if isinstance(tensor, DTensor) else value


def _distributed(value: Tensor, tensor: DTensor) -> DTensor:
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
