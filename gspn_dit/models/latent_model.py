"""What the three families share: the way in, the way out, and diffusers' habits."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from typing import Any, Self

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, int32, int64, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from gspn_dit.errors import InputError
from gspn_dit.layers.blocks import is_whole
from gspn_dit.layers.embeddings import LabelEmbedding, PatchEmbedding, TimestepEmbedding


class LatentModel(ModelMixin, ConfigMixin):
    """A class-conditional network over latents: model(latents, timesteps, class_labels) → prediction.

    Args:
        width: Channels C of a token.
        sample_size: Side of the latents the model is made for, or (height, width).
        patch_size: Side p of the square patch that becomes a token.
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction: 8 for noise and variance (`ddpm`), 4 for velocity (`flow`).
        num_classes: Classes, without the null class.

    Raises:
        InputError: A number below 1, or a sample size that the patch does not divide.
    """

    _supports_gradient_checkpointing = True

    def __init__(
        self,
        *,
        width: int,
        sample_size: int | Sequence[int],
        patch_size: int,
        in_channels: int,
        out_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        for name, value in {
            "width": width,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "num_classes": num_classes,
        }.items():
            require_count(name, value)
        self.gradient_checkpointing = False
        self.in_channels, self.out_channels, self.patch_size = in_channels, out_channels, patch_size
        self.sample_height, self.sample_width = self._checked_sample_size(sample_size)
        self.null_class = num_classes
        self.x_embedder = PatchEmbedding(patch_size, in_channels, width)
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes, width)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any) -> Self:
        """As diffusers', but a folder without some of the weights is refused, where diffusers would leave them out.

        Raises:
            InputError: The folder lacks weights that the model has, or has them in another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        remedy = "they are of another version: train or export it anew"
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except ValueError as error:
            if not (found := re.search(r"because (\S+) expected shape", str(error))):
                raise
            raise InputError(
                f"{pretrained_model_name_or_path}: weights of another shape than the {cls.__name__}'s, "
                f"such as {found[1]}; {remedy}"
            ) from error
        if missing := sorted(info["missing_keys"]):
            raise InputError(
                f"{pretrained_model_name_or_path}: {len(missing)} of the {cls.__name__}'s weights are not in it, "
                f"such as {missing[0]}; {remedy}"
            )
        return (model, info) if wants_info else model

    def embed(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, H, W, C) and their condition (B, 1, 1, C).

        Raises :class:`InputError` on misshapen input, and on the CPU for a label that is no class: on a GPU, where to
        read them is to wait for all that was asked of it before, it is the embedding that fails, with an assertion.
        """
        self._check_inputs(latents, timesteps, class_labels)
        condition = self.t_embedder(timesteps) + self.y_embedder(class_labels)
        return self.x_embedder(latents), condition[:, None, None]

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """As diffusers', but for the default function: theirs asks for torch's version, which stops torch.compile."""
        super().enable_gradient_checkpointing(gradient_checkpointing_func or partial(checkpoint, use_reentrant=False))

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """A block, recomputed in the backward pass where `enable_gradient_checkpointing()` asked for it."""
        if self.gradient_checkpointing and is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Each site's p · p · C_out values, ordered (row, column, channel), back in their places: (B, C_out, h, w)."""
        p = self.patch_size
        x = x.unflatten(-1, (p, p, self.out_channels))  # (B, H, W, p, p, C_out)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @property
    def patch_values(self) -> int:
        """Values that the last layer predicts at each token."""
        return self.patch_size**2 * self.out_channels

    def _checked_sample_size(self, sample_size: int | Sequence[int]) -> tuple[int, int]:
        size = tuple(sample_size) if isinstance(sample_size, Sequence) else (sample_size, sample_size)
        p = self.patch_size
        if len(size) != 2 or not all(is_whole(side) and side >= 1 and side % p == 0 for side in size):
            raise InputError(f"sample_size={sample_size!r}: give a side or (height, width) divisible by patch_size={p}")
        return size

    def _check_inputs(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> None:
        if latents.ndim != 4 or latents.shape[1] != self.in_channels:
            raise InputError(f"latents of shape {tuple(latents.shape)}: give (B, {self.in_channels}, height, width)")
        batch, _, height, width = latents.shape
        if height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"latents of {height}×{width}: give a height and width divisible by the patch size, {self.patch_size}"
            )
        for name, value in (("timesteps", timesteps), ("class_labels", class_labels)):
            if not isinstance(value, Tensor):
                raise InputError(f"{name}={value!r}: give a tensor of one for each latent, ({batch},)")
            if value.shape != (batch,):
                raise InputError(f"{name} of shape {tuple(value.shape)}: give one for each latent, ({batch},)")
        if class_labels.dtype not in (int64, int32):
            raise InputError(f"class_labels of {class_labels.dtype}: give class ids, torch.long")
        if batch and class_labels.device.type == "cpu" and type(class_labels) is Tensor and not is_compiling():
            wrong = class_labels[(class_labels < 0) | (class_labels > self.null_class)]
            if len(wrong):
                raise InputError(
                    f"class_labels: {int(wrong[0])} is among them; give 0 to {self.null_class - 1}, or "
                    f"{self.null_class} for no class"
                )


def require_count(name: str, value: object) -> None:
    """Raise :class:`InputError` unless the value is a whole number from 1."""
    if not is_whole(value) or value < 1:
        raise InputError(f"{name}={value!r}: give a whole number from 1")
