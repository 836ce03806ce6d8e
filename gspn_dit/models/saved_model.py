"""The base of every model: saved and loaded as diffusers' models are, and blocks that may be recomputed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any, Literal, Self, overload

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import is_accelerate_available
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from gspn_dit.errors import InputError, is_whole
from gspn_dit.layers.chunks import Chunk


class SavedModel(ModelMixin, ConfigMixin):
    """A diffusers model whose files are all there or refused, and whose gradient checkpointing torch.compile takes."""

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, *, output_loading_info: Literal[True], **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @overload
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any) -> Self: ...

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """As diffusers', but a folder without some of the weights is refused, where diffusers would leave them out.

        What else a model takes, such as weights that others have published, :meth:`published` says.

        Weights of another shape are refused too, unless `ignore_mismatched_sizes` asks for them to be left out. The
        dtype may be called `dtype` or, as diffusers called it before, `torch_dtype`; None is float32.

        Raises:
            InputError: The folder lacks weights that the model has, or has them in another shape.
        """
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())  # which asks for accelerate, loudly
        wants_info = kwargs.pop("output_loading_info", False)
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        # versions of diffusers differ in the name, and warn of the other: the weights are converted here
        given = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        dtype = next((each for each in given if isinstance(each, torch.dtype)), torch.float32)
        info: dict[str, Any] = {f"{kind}_keys": [] for kind in ("missing", "unexpected", "mismatched")}
        model = cls.published(pretrained_model_name_or_path, **kwargs)
        if model is None:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        remedy = "they are of another version: train or export it anew"
        if info["mismatched_keys"] and not may_mismatch:
            raise InputError(
                f"{pretrained_model_name_or_path}: weights of another shape than the {cls.__name__}'s, "
                f"such as {sorted(info['mismatched_keys'])[0][0]}",
                remedy=remedy,
            )
        if missing := sorted(info["missing_keys"]):
            raise InputError(
                f"{pretrained_model_name_or_path}: {len(missing)} of the {cls.__name__}'s weights are not in it, "
                f"such as {missing[0]}",
                remedy=remedy,
            )
        # diffusers' own warns, of any dtype, of the modules that should stay in float32, of which there are none
        nn.Module.to(model, dtype)
        return (model, info) if wants_info else model

    @classmethod
    def published(cls, path: str | PathLike, **kwargs: Any) -> Self | None:
        """The model of a file or folder in another project's format; None for a folder of this one's."""
        return None

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """As diffusers', but for the default function: theirs asks for torch's version, which stops torch.compile."""
        super().enable_gradient_checkpointing(gradient_checkpointing_func or partial(checkpoint, use_reentrant=False))

    def run(self, block: nn.Module, *inputs: Tensor | Chunk) -> Tensor:
        """A block, recomputed in the backward pass where `enable_gradient_checkpointing()` asked for it."""
        if self.gradient_checkpointing and is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


def require_count(name: str, value: object) -> None:
    """Raise :class:`InputError` unless the value is a whole number from 1."""
    if not is_whole(value) or value < 1:
        raise InputError("give a whole number from 1", argument=name, value=value)
