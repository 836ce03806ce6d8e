"""The chunks of a model's scans at sizes it was not trained at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gspn_dit.errors import InputError, is_finite
from gspn_dit.layers.mixers import GSPNMixer
from gspn_dit.models.gspn import GSPNCore


def chunked_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model whose scans run over chunks of the map, not over all of it."""
    return [layer for layer in model.modules() if isinstance(layer, GSPNMixer | GSPNCore) and layer.chunk is not None]


@contextmanager
def scaled_chunks(model: nn.Module, scale: float) -> Iterator[None]:
    """In the block, chunks are `scale` times as long, rounded to whole lines; global layers stay global.

    Raises :class:`InputError` if the scale is not positive or no layer of the model has a chunk.
    """
    layers = chunked_layers(model)
    if not is_finite(scale) or scale <= 0:
        raise InputError(f"chunk_scale={scale!r}: wanted a positive number, or auto")
    if not layers:
        raise InputError(f"chunk_scale={scale!r}: no layer of this {type(model).__name__} has a chunk; leave it out")
    trained = [layer.chunk for layer in layers]
    try:
        for layer, chunk in zip(layers, trained, strict=True):
            layer.chunk = max(1, round(chunk * scale))
        yield
    finally:
        for layer, chunk in zip(layers, trained, strict=True):
            layer.chunk = chunk
