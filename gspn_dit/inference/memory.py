"""Whether a device could ever have the memory that drawing takes: said before the first forward, not by a crash."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from gspn_dit.autoencoder import downsampling
from gspn_dit.devices import memory_of
from gspn_dit.errors import InputError
from gspn_dit.precision import DTYPES
from gspn_dit.storage.files import in_bytes

_LEAST_MAPS = 5  # of tokens at the peak of a forward: a few less than were measured (docs/results.md)


def check_memory(
    pipe: DiffusionPipeline, shape: Sequence[int], forwards: int, mixed_precision: str, device: torch.device
) -> None:
    """Raise :class:`InputError` for latents (B, C, h, w) that are more than a device could ever have memory for.

    Args:
        pipe: A :class:`~gspn_dit.inference.pipeline.GSPNDiTPipeline`.
        shape: Of the latents.
        forwards: Predictions of an image that are one forward: 2 with classifier-free guidance.
        mixed_precision: `no`, `bf16` or `fp16`.
        device: The device of the transformer.
    """
    transformer, factor = pipe.transformer, downsampling(pipe.vae)
    batch, _, height, width = shape
    tokens = batch * height * width // transformer.config.patch_size**2 * forwards
    value = 2 if mixed_precision in DTYPES else transformer.dtype.itemsize
    needed, memory = _LEAST_MAPS * tokens * transformer.config.width * value, memory_of(device)
    if needed > memory:
        raise InputError(
            f"with width={width * factor}, {batch} at a time take over {in_bytes(needed)}, and the memory of {device} "
            f"is {in_bytes(memory)}",
            argument="height",
            value=height * factor,
            remedy="draw fewer at a time, or smaller ones",
        )
