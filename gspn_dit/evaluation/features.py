"""One pass over a set of images: its features, shared over processes, into whatever accumulates them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from gspn_dit.evaluation.extractors import Extractor
from gspn_dit.evaluation.image_sets import ImageSet
from gspn_dit.processes import ALONE, Processes
from gspn_dit.progress import progress

BATCH_SIZE = 64
FEWEST_BATCHES = 16  # a set of few images is cut finer, so that several processes share that too
BATCHES_AHEAD = 2


class Accumulator(Protocol):
    """What takes in one layer of every image's features, and keeps as little of it as its figure needs."""

    def update(self, indices: Tensor, values: Tensor) -> None:
        """Take in the layer (n, width) of images `indices` (n,)."""

    def combine(self, processes: Processes) -> None:
        """Make this what all processes together have taken in."""


class Encoder(Protocol):
    """What gives layers of images: an :class:`~gspn_dit.evaluation.extractors.Extractor`, or CLIP."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def __call__(self, images: Tensor, /) -> dict[str, Tensor]:
        """Every layer (B, width) of images (B, 3, H, W) on the device, by its name."""


def observe(
    images: ImageSet,
    extractor: Encoder,
    accumulators: Sequence[tuple[str, Accumulator]],
    processes: Processes = ALONE,
) -> None:
    """Give each accumulator its layer of all images.

    Batches are the same ones however many processes share them, so that every image's features are too.
    """
    for indices, layers in _extract(images, extractor, processes):
        for layer, accumulator in accumulators:
            accumulator.update(indices, layers[layer])
    for _, accumulator in accumulators:
        accumulator.combine(processes)


def layer_widths(extractor: Extractor, image_size: tuple[int, int]) -> dict[str, int]:
    """How many values each of the extractor's layers has, for images of (height, width)."""
    black = torch.zeros(1, 3, *image_size, dtype=torch.uint8, device=extractor.device)
    return {name: values.shape[1] for name, values in extractor(black).items()}


def _extract(images: ImageSet, extractor: Encoder, processes: Processes) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """This process's batches: indices (n,), and each layer (n, width) on the extractor's device.

    The next batches are read while one is computed.
    """
    batches = torch.arange(len(images)).split(min(BATCH_SIZE, -(-len(images) // FEWEST_BATCHES)))
    ahead: deque[tuple[Tensor, Future[Tensor]]] = deque()
    with (
        ThreadPoolExecutor() as readers,
        ThreadPoolExecutor(1) as batcher,
        progress(total=len(images), unit="image", desc=images.source, disable=not processes.is_main) as bar,
    ):

        def next_features() -> tuple[Tensor, dict[str, Tensor]]:
            indices, batch = ahead.popleft()
            layers = extractor(batch.result().to(extractor.device))
            bar.update(min(len(indices) * processes.count, len(images) - bar.n))
            return indices, layers

        for indices in processes.share(batches):
            ahead.append((indices, batcher.submit(images.batch, indices.tolist(), readers)))
            if len(ahead) > BATCHES_AHEAD:
                yield next_features()
        while ahead:
            yield next_features()
        bar.update(len(images) - bar.n)
