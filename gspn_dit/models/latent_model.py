"""The base of every family: latents to tokens and back, sizes, and chunks of scans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from gspn_dit.errors import InputError, is_whole
from gspn_dit.layers.chunks import Chunk, scale_chunk
from gspn_dit.layers.embeddings import PatchEmbedding
from gspn_dit.models.saved_model import SavedModel, require_count


class LatentModel(SavedModel):
    """A network over latents: model(latents, timesteps, …, chunk_scale=1.0) → prediction.

    A family decides what it is conditioned on: it names the arguments of its forward and makes their embedders.

    Args:
        width: Channels C of a token.
        sample_size: Side of the latents the model is made for, or (height, width).
        patch_size: Side p of the square patch that becomes a token.
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction: 8 for noise and variance (`ddpm`), 4 for velocity (`flow`).

    Attributes:
        chunks: Lines or window that each block's scans run over, None for the whole map; empty in a family without
            scans.
        conditioned_on: The kind of condition that its forward takes: `class_labels` or `text`.
        of_before: By the name of an option, what a configuration means that was saved without it. An option whose
            default has changed is named here, so that what was saved before stays what it was.

    Raises:
        InputError: A number below 1, or a sample size that the patch does not divide.
    """

    chunks: tuple[Chunk, ...] = ()
    conditioned_on: ClassVar[str] = "class_labels"
    of_before: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self, *, width: int, sample_size: int | Sequence[int], patch_size: int, in_channels: int, out_channels: int
    ) -> None:
        super().__init__()
        for name, value in {
            "width": width,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
        }.items():
            require_count(name, value)
        self.in_channels, self.out_channels, self.patch_size = in_channels, out_channels, patch_size
        self.sample_height, self.sample_width = self._checked_sample_size(sample_size)
        self.x_embedder = PatchEmbedding(patch_size, in_channels, width)

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """As diffusers', for a configuration that may have been saved before there were all options: `of_before`."""
        return super().extract_init_dict({**cls.of_before, **config_dict}, **kwargs)

    def example_condition(self, batch: int) -> dict[str, Tensor]:
        """The named tensors that forward takes beside latents and timesteps, for `batch` samples, of any value.

        Operations and memory are counted with them, by code that does not know what the family is conditioned on.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its forward is conditioned on")

    def example_inputs(self, size: tuple[int, int], condition: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All of forward's tensors for one sample: latents of that height and width, and a condition or the example."""
        return {
            "latents": torch.zeros(1, self.in_channels, *size, device=self.device),
            "timesteps": torch.zeros(1, device=self.device),
            **(self.example_condition(1) if condition is None else condition),
        }

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents (B, C_in, h, w) as tokens (B, H, W, C). Raises :class:`InputError` if they are misshapen."""
        if latents.ndim != 4 or latents.shape[1] != self.in_channels:
            raise InputError(
                f"shape {tuple(latents.shape)}", argument="latents", wanted=f"(B, {self.in_channels}, height, width)"
            )
        height, width = latents.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"height and width {height}×{width}",
                argument="latents",
                wanted=f"both divisible by the patch size, {self.patch_size}",
            )
        return self.x_embedder(latents)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Each token's p · p · C_out values, ordered (row, column, channel), as a map again: (B, C_out, h, w)."""
        p = self.patch_size
        x = x.unflatten(-1, (p, p, self.out_channels))  # (B, H, W, p, p, C_out)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @property
    def patch_values(self) -> int:
        """Values that the last layer predicts at each token."""
        return self.patch_size**2 * self.out_channels

    @property
    def has_chunks(self) -> bool:
        """Whether some layer's scans run over chunks of the map, not over all of it."""
        return any(chunk is not None for chunk in self.chunks)

    def check_chunk_scale(self, scale: float) -> None:
        """Raise :class:`InputError` unless forward takes the scale: positive, and 1 where no layer has a chunk."""
        if scale == 1:
            return
        is_number = isinstance(scale, Real) and not isinstance(scale, bool)
        if not is_number or not 0 < scale < math.inf:  # not math.isfinite, which torch.compile cannot trace
            raise InputError(argument="chunk_scale", value=scale, wanted="a positive number")
        if not self.has_chunks:
            raise InputError(
                f"no layer of this {type(self).__name__} has a chunk",
                argument="chunk_scale",
                value=scale,
                remedy="leave it out",
            )

    def scaled_chunks(self, scale: float) -> Sequence[Chunk]:
        """Each block's chunk, `scale` times as long as in training. Raises as :meth:`check_chunk_scale`."""
        self.check_chunk_scale(scale)
        return self.chunks if scale == 1 else [scale_chunk(chunk, scale) for chunk in self.chunks]

    def _checked_sample_size(self, sample_size: int | Sequence[int]) -> tuple[int, int]:
        size = tuple(sample_size) if isinstance(sample_size, Sequence) else (sample_size, sample_size)
        p = self.patch_size
        if len(size) != 2 or not all(is_whole(side) and side >= 1 and side % p == 0 for side in size):
            raise InputError(
                f"give a side or (height, width) divisible by patch_size={p}", argument="sample_size", value=sample_size
            )
        return size


def check_one_each(latents: Tensor, **vectors: Tensor) -> None:
    """Raise :class:`InputError` for a named vector that is not a tensor of one value for each latent, (B,)."""
    batch = len(latents)
    for name, value in vectors.items():
        if not isinstance(value, Tensor):
            raise InputError(f"give a tensor of one for each latent, ({batch},)", argument=name, value=value)
        if value.shape != (batch,):
            raise InputError(f"shape {tuple(value.shape)}", argument=name, wanted=f"one for each latent, ({batch},)")
