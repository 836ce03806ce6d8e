"""The processes that share one command's work: each takes its part, and a sum makes the parts whole again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gspn_dit.devices import join_processes


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; by default there is no other.

    Args:
        rank: Its number, 0 for the one that prints and writes.
        count: How many there are.
        device: Where sums over them are made.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, parts: Sequence) -> Sequence:
        """This process's share of the parts, every `count`-th."""
        return parts[self.rank :: self.count]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, in each of them; all must call it in the same order."""
        if self.count == 1:
            return tensor
        total = tensor.to(self.device).contiguous()
        torch.distributed.all_reduce(total)
        return total.to(tensor.device)


ALONE = Processes()


@contextmanager
def launched(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """This process among those that `accelerate launch` started, and the device it computes on.

    Args:
        device: As the option: `auto` gives each process its own accelerator, if there are any.

    Raises:
        InputError: If there is no such device, or one is named that several processes would share.
    """
    state, device = join_processes(device)
    if state.num_processes == 1:
        yield ALONE, device
        return
    yield Processes(state.process_index, state.num_processes, state.device), device
    state.destroy_process_group()
