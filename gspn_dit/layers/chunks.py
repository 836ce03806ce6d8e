"""Chunks: which layers scan the map in chunks of lines, and how long chunks are at sizes other than trained.

A chunk is an argument of a layer's forward: a number of lines, or None for a scan of the whole map.
"""

from __future__ import annotations

from collections.abc import Sequence

from gspn_dit.errors import InputError, is_whole


def chunk_by_layer(chunk: int | None, global_layers: int | Sequence[int], depth: int) -> list[int | None]:
    """The `chunk` that each of `depth` layers hands to :func:`gspn_dit.ops.propagate`; None is a global scan.

    Args:
        chunk: Lines that a local layer's scan runs over; None makes every layer global.
        global_layers: How many of the last layers are global, or the indices of those that are (-1 is the last).

    Raises:
        InputError: A chunk below 1, a count outside 0 … depth or an index outside the layers.
    """
    if chunk is not None and not (is_whole(chunk) and chunk >= 1):
        raise InputError(
            "give a number of lines from 1, or None for global scans in every layer", argument="chunk", value=chunk
        )
    if is_whole(global_layers):
        if not 0 <= global_layers <= depth:
            raise InputError(
                f"give a count from 0 to the {depth} layers there are", argument="global_layers", value=global_layers
            )
        chosen = set(range(depth - global_layers, depth))
    else:
        if not isinstance(global_layers, Sequence) or not all(
            is_whole(i) and -depth <= i < depth for i in global_layers
        ):
            raise InputError(
                f"give a count, or a list of indices of the layers 0 to {depth - 1}",
                argument="global_layers",
                value=global_layers,
            )
        chosen = {i % depth for i in global_layers}
    return [None if i in chosen else chunk for i in range(depth)]


def scale_chunk(chunk: int | None, scale: float) -> int | None:
    """A chunk `scale` times as long, rounded to whole lines, at least one; a global scan (None) stays global."""
    return None if chunk is None else max(1, round(chunk * scale))
