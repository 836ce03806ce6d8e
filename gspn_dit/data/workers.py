"""Processes that read data ahead of the one that uses it, and behave as if that one had read it itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, TypeVar

from torch.utils.data import DataLoader, Dataset, default_collate

from gspn_dit.errors import InputError

T = TypeVar("T")


def load(
    dataset: Dataset,
    batches: Any,
    num_workers: int,
    collate_fn: Callable[[Any], Any] = default_collate,
    **options: Any,
) -> Iterator[Any]:
    """The batches of a dataset, in order, read by that many processes; 0 reads in this one.

    Args:
        dataset: What is read.
        batches: The indices of each batch.
        num_workers: Processes.
        collate_fn: Makes a batch of samples.
        options: Others of torch's DataLoader.

    Raises:
        InputError: As the dataset raised it, in whichever process.
        RuntimeError: If such a process dies, which :func:`is_of_a_dead_worker` tells; in the loop over the batches or
            wherever the main thread is then.
    """
    loader = DataLoader(
        _WithErrors(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        worker_init_fn=heed_only_the_parent,
        collate_fn=partial(_collated, collate_fn),
        **options,
    )
    with unheard_signals():
        loaded = iter(loader)
    return _raising(loaded)


class Ahead(Iterator[T]):
    """An iterator whose next item can be fetched before it is asked for, while something else is awaited.

    An error that fetching meets is raised when the item is asked for.

    Args:
        items: What is iterated over.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._fetched: list[Callable[[], T]] = []

    def fetch(self) -> None:
        """Fetch the next item, unless it is there."""
        if not self._fetched:
            try:
                item = next(self._items)
                self._fetched.append(lambda: item)
            except Exception as error:  # StopIteration too
                self._fetched.append(partial(_raise, error))

    def __next__(self) -> T:
        self.fetch()
        return self._fetched.pop()()


def _raise(error: Exception) -> NoReturn:
    raise error


class _WithErrors(Dataset):
    """A dataset whose batch is an :class:`InputError`, where reading it raises one.

    torch would make one of the text of a worker's traceback, without what the error holds.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        many = getattr(self.dataset, "__getitems__", None)
        try:
            return many(indices) if many else [self.dataset[index] for index in indices]
        except InputError as error:
            return error


def _collated(collate_fn: Callable[[Any], Any], samples: Any) -> Any:
    return samples if isinstance(samples, InputError) else collate_fn(samples)


def _raising(loaded: Iterator[Any]) -> Iterator[Any]:
    """What is loaded; an error among it is raised."""
    try:
        for batch in loaded:
            if isinstance(batch, InputError):
                raise batch
            yield batch
    except (OSError, EOFError) as error:  # a queue that ends, or an error that a worker had and tells of
        if "worker process" in str(error):
            raise
        raise RuntimeError(f"{_DEAD} unknown) is gone") from error


_DEAD = "DataLoader worker (pid"  # how torch begins


def is_of_a_dead_worker(error: RuntimeError) -> bool:
    """Whether an error says that a process that reads data died."""
    return str(error).startswith(_DEAD)


def heed_only_the_parent(_: int = 0) -> None:
    """A worker's start: a scheduler's SIGTERM and a terminal's Ctrl-C reach it too, and the last step needs its data.

    It must go on heeding the process it works for, which ends its workers by SIGTERM and then waits for them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def unheard_signals() -> Iterator[None]:
    """In the block SIGTERM and SIGINT wait, and processes that are started in it are deaf to them from the first."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
