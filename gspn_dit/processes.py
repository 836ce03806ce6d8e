"""The processes that share one command's work: those that `accelerate launch` started, or one that is alone.

They divide the work, sum what each has found, fail as one, and agree on what to compute in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor

from gspn_dit.arguments import MixedPrecision
from gspn_dit.devices import choose_device
from gspn_dit.errors import InputError
from gspn_dit.precision import Precision, choose_precision

T = TypeVar("T")
_LONGEST_WAIT = timedelta(days=1)  # of a process that has done its share for the slowest one


def join_processes(device: str = "auto") -> tuple[PartialState, torch.device]:
    """The processes that `accelerate launch` started, this one among them, and the device of this one.

    A process that nothing launched is alone, on the device called so.

    Raises :class:`InputError` for a device that is not there, or one device for several processes.
    """
    forced = device == "auto" and parse_flag_from_env("ACCELERATE_USE_CPU")  # accelerate launch --cpu
    chosen = choose_device("cpu" if forced else device)
    if "LOCAL_RANK" not in os.environ:
        return PartialState(), chosen
    if device not in ("auto", chosen.type):
        raise InputError(
            "under accelerate launch each process has its own", argument="device", value=device, remedy="leave it out"
        )
    processes = PartialState(cpu=chosen.type == "cpu", timeout=_LONGEST_WAIT)
    return processes, processes.device


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
    state, chosen = join_processes(device)
    if state.num_processes == 1:
        yield ALONE, chosen
        return
    yield Processes(state.process_index, state.num_processes, state.device), chosen
    state.destroy_process_group()


def agreed_precision(asked: MixedPrecision, device: torch.device) -> Precision:
    """What `asked` is for all processes of a launch: the first whose device lacks bfloat16 decides. All call this."""
    everyone = gather_object([choose_precision(asked, device)])
    lacking = [process for process, each in enumerate(everyone) if not each.native]
    if not lacking or len(lacking) == len(everyone):
        return everyone[0]
    return replace(everyone[lacking[0]], reason=f"process {lacking[0]}: {everyone[lacking[0]].reason}")


class SharedInputError(InputError):
    """An :class:`InputError` that all processes raise alike: one of them prints it."""


def on_every_process(work: Callable[[], T]) -> T:
    """Do it on every process; an :class:`InputError` of one is raised on all, so that none waits for one that left."""
    result, problem = _result_or_problem(work)
    _raise_first(gather_object([problem]))
    return cast("T", result)  # None only where that is what the work gives


def on_main_process(work: Callable[[], T], is_main: bool) -> T:
    """Do it on the main process alone; its result, or its :class:`InputError`, is that of every process."""
    result, problem = broadcast_object_list(list(_result_or_problem(work) if is_main else (None, None)))
    _raise_first([problem])
    return result


def _result_or_problem(work: Callable[[], T]) -> tuple[T | None, InputError | None]:
    try:
        return work(), None
    except InputError as error:
        return None, error


def _raise_first(problems: list[InputError | None]) -> None:
    first = next((problem for problem in problems if problem is not None), None)
    if first is not None:
        raise SharedInputError(
            first.problem, argument=first.argument, value=first.value, wanted=first.wanted, remedy=first.remedy
        ) from first
