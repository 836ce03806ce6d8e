"""What a source of training data is: the protocol that images and latent stores share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol, TypeGuard

from torch import Tensor


class Source(Protocol):
    """Samples by index, the same each time they are asked for; the training stream mirrors and shuffles them.

    Attributes:
        class_names: Name of each class.
        latent_shape: (C, h, w) where the samples are latents already; None where they are images.
        condition_names: Which tensors of a sample say what the image is of; `class_labels` for today's models.
    """

    class_names: list[str]

    @property
    def latent_shape(self) -> tuple[int, int, int] | None: ...

    @property
    def condition_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def sample(self, index: int, flip: bool = False, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Sample `index`, or its mirror image, with those tensors of `condition_names` that are in `names`, or all.

        `image` uint8 (3, H, W), or of latents `moments` (2C, h, w) float32; `class_labels` () long; and any other
        tensor of these names, without an axis of the batch.
        """
        ...


class LatentSource(Source, Protocol):
    """A source of latents, which says by what VAE they were made and how they are scaled.

    Attributes:
        vae: Name or folder of the VAE.
        vae_sha256: SHA-256 of the weights of its `encoder` and `decoder`; None where it is not known.
        scaling_factor: See :class:`~gspn_dit.autoencoder.vae.LatentScaling`, as for the next three.
        shift_factor: See there.
        latents_mean: See there.
        latents_std: See there.
        manifest: What else is known of the latents.
    """

    vae: str
    vae_sha256: dict[str, str] | None
    scaling_factor: float
    shift_factor: float | None
    latents_mean: list[float] | None
    latents_std: list[float] | None
    manifest: dict[str, Any]

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...


def is_of_latents(source: Source) -> TypeGuard[LatentSource]:
    """Whether a source's samples are latents already."""
    return source.latent_shape is not None
