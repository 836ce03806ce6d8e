"""Chunks: which layers scan the map in chunks of lines, and how long chunks are at sizes other than trained.

A chunk is an argument of a layer's forward: a number of lines, a window of both axes, or None for the whole map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gspn_dit.errors import InputError, is_whole
from gspn_dit.layers.windows import Window

Chunk = int | Window | None
WINDOWS = ("aligned", "shifted")


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


def as_windows(chunks: Sequence[int | None], windows: str | None) -> list[Chunk]:
    """The layers' chunks as windows whose side they are.

    Args:
        chunks: A number of lines a layer, None for one that is global and stays so.
        windows: `aligned`, or `shifted` where every second local layer's grid starts half a window later; None leaves
            chunks of lines.

    Raises:
        InputError: Another word.
    """
    if windows is None:
        return list(chunks)
    if windows not in WINDOWS:
        raise InputError(
            f"give one of {', '.join(WINDOWS)}, or None for chunks of lines", argument="windows", value=windows
        )
    local = [layer for layer, chunk in enumerate(chunks) if chunk is not None]
    return [
        None if chunk is None else Window(chunk, shifted=windows == "shifted" and local.index(layer) % 2 == 1)
        for layer, chunk in enumerate(chunks)
    ]


def scan_options(chunk: Chunk) -> dict[str, Any]:
    """The arguments of :func:`gspn_dit.ops.propagate` that a layer's chunk stands for."""
    return {"window": chunk.side, "shift": chunk.shift} if isinstance(chunk, Window) else {"chunk": chunk}


def scale_chunk(chunk: Chunk, scale: float) -> Chunk:
    """A chunk `scale` times as long, rounded to whole lines, at least one; a global scan (None) stays global."""
    if isinstance(chunk, Window):
        return replace(chunk, side=scaled_lines(chunk.side, scale))
    return None if chunk is None else scaled_lines(chunk, scale)


def scaled_lines(lines: int, scale: float) -> int:
    """So many times as many lines, rounded to whole ones, at least one."""
    return max(1, round(lines * scale))
