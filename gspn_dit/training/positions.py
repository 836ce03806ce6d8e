"""Positions in a run: which image is shown at each, and which of them a process takes at a step.

Position n belongs to step n // B of a global batch of B images, whatever the number of processes, workers or
accumulation steps. What is drawn for it comes from a counter-based generator keyed by (seed, n).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from gspn_dit.errors import InputError

_ORDER = 1 << 63  # keys from here up are epochs' orders, below are positions


def generator_at(seed: int, key: int) -> np.random.Generator:
    """The random numbers of a position, below 2^63, of a run of that seed."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, key], dtype=np.uint64)))


class EpochOrder:
    """The image at each position: every epoch is a new permutation.

    Args:
        count: How many images there are.
        seed: Of the permutations.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __call__(self, position: int) -> int:
        """The index of the image at a position."""
        epoch, place = divmod(position, self.count)
        return int(self._order(epoch)[place])

    def many(self, positions: np.ndarray) -> np.ndarray:
        """The indices of the images at positions, both int64 (n,)."""
        epochs, places = np.divmod(positions, self.count)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._order(int(epoch))[places[chosen]]
        return indices

    def _shuffled(self, epoch: int) -> np.ndarray:
        return generator_at(self.seed, _ORDER + epoch).permutation(self.count)

    def __getstate__(self) -> dict[str, int]:
        return {"count": self.count, "seed": self.seed}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class StepSampler(Sampler):
    """The stream positions of this process's micro-batches, for steps [first, last): step s is positions [sB, sB + B).

    Args:
        first: Step to begin with.
        last: Step to end before.
        batch_size: B, over all processes and accumulation steps.
        accumulation: Micro-batches per step.
        rank: This process.
        processes: How many there are.

    Raises:
        InputError: If the batch does not split evenly.
    """

    def __init__(self, first: int, last: int, *, batch_size: int, accumulation: int, rank: int, processes: int) -> None:
        self.first, self.last = first, last
        self.batch_size, self.accumulation, self.rank, self.processes = batch_size, accumulation, rank, processes
        self.micro_batch, rest = divmod(batch_size, accumulation * processes)
        if rest:
            raise InputError(
                argument="training.batch_size",
                value=batch_size,
                wanted=(
                    f"a multiple of {accumulation * processes} ({accumulation} accumulation steps × "
                    f"{processes} processes)"
                ),
            )

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            for micro in range(self.accumulation):
                start = step * self.batch_size + (micro * self.processes + self.rank) * self.micro_batch
                yield list(range(start, start + self.micro_batch))

    def __len__(self) -> int:
        return max(0, self.last - self.first) * self.accumulation
