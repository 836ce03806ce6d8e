"""Named tensors that a latent store holds beside the latents of each image, such as hidden states of a text encoder."""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gspn_dit.errors import InputError

STORABLE = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORABLE}  # by the name that a manifest gives them
# What samples, shards and models call something else.
TAKEN = (
    "chunk_scale",
    "class_labels",
    "drop",
    "image",
    "labels",
    "latents",
    "moments",
    "noise",
    "posterior_noise",
    "timesteps",
    "u",
)


@dataclass(frozen=True)
class Extra:
    """What one of these tensors is like.

    Args:
        dtype: Its type, one of :data:`STORABLE`.
        shape: Its shape for one image.
        made_by: By what it is made, in words or as a checksum: an encoding is not continued with another.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    made_by: str = ""


class Extras(Protocol):
    """Makes the tensors while a data set is encoded.

    Attributes:
        declared: What each is like, by the name under which samples will hold it. A model takes it as an argument of
            that name.
    """

    declared: Mapping[str, Extra]

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors (n, …) of the images of these indices of the data set, by name, in the order of the indices.

        It is to be the same in every process. It is called in the encoding's mixed precision, without gradients.
        """
        ...


def to_json(declared: Mapping[str, Extra]) -> dict[str, Any] | None:
    """What encode.json and the manifest say of the tensors; None if there are none, as in stores of format 1.

    Raises :class:`InputError` for a name that cannot be an argument of a model or is taken, or a type that is not
    stored.
    """
    for name, extra in declared.items():
        if not name.isidentifier() or keyword.iskeyword(name) or name in ("self", *TAKEN):
            raise InputError(
                argument="extras",
                value=name,
                wanted=f"the name of an argument of the model, none of {', '.join(TAKEN)}",
            )
        if extra.dtype not in STORABLE:
            raise InputError(
                f"{extra.dtype} is not stored", argument="extras", value=name, wanted=f"one of {', '.join(DTYPES)}"
            )
    described = {
        name: {
            "dtype": str(extra.dtype).removeprefix("torch."),
            "shape": list(extra.shape),
            "made_by": extra.made_by,
        }
        for name, extra in declared.items()
    }
    return described or None


def from_json(described: Mapping[str, Any] | None) -> dict[str, Extra]:
    """What :func:`to_json` described. Raises :class:`InputError` for what it could not have written."""
    try:
        return {
            name: Extra(DTYPES[each["dtype"]], tuple(each["shape"]), each["made_by"])
            for name, each in (described or {}).items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"this version cannot read what they are like ({error!r})",
            argument="extras",
            value=described,
            remedy="restore the store's manifest.json, or read it with the version that wrote it",
        ) from error


def bytes_per_image(declared: Mapping[str, Extra]) -> int:
    """What the tensors of one image take in a store."""
    return sum(math.prod(extra.shape) * extra.dtype.itemsize for extra in declared.values())


def no_extras(declared: Mapping[str, Extra]) -> dict[str, Tensor]:
    """The tensors of no image."""
    return {name: torch.empty(0, *extra.shape, dtype=extra.dtype) for name, extra in declared.items()}


def check_extras(declared: Mapping[str, Extra], tensors: Mapping[str, Tensor], count: int) -> None:
    """Raise :class:`InputError` unless the tensors of `count` images are as declared, and finite."""
    for name in {**declared, **tensors}:
        if name not in tensors or name not in declared:
            problem = "is declared and not given" if name in declared else "is given and not declared"
            raise InputError(f"it {problem}", argument="extras", value=name)
        extra, tensor = declared[name], tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (extra.dtype, wanted := (count, *extra.shape)):
            raise InputError(
                f"it is {tensor.dtype} {tuple(tensor.shape)} for {count} images",
                argument="extras",
                value=name,
                wanted=f"{extra.dtype} {wanted} as declared",
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"it is not finite in {extra.dtype}", argument="extras", value=name)
