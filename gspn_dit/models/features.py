"""The maps of a classifier's stages, for detection and segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gspn_dit.errors import InputError, is_whole

if TYPE_CHECKING:
    from gspn_dit.models.classifier import GSPNClassifier


def chosen_stages(count: int, indices: Sequence[int] | int | None) -> list[int]:
    """Indices of stages, from 0, by a list of indices (-1 is the last) or a number of last ones; None is all.

    Raises:
        InputError: None of these, or a stage that is not there.
    """
    if indices is None:
        indices = count
    if is_whole(indices) and 1 <= indices <= count:
        return list(range(count - indices, count))
    listed = isinstance(indices, Sequence) and not isinstance(indices, str) and len(indices) > 0
    if not listed or not all(is_whole(i) and -count <= i < count for i in indices):  # type: ignore[union-attr]
        raise InputError(
            f"give a list of indices of the stages 0 to {count - 1}, or a number of last ones",
            argument="out_indices",
            value=indices,
        )
    return [i % count for i in indices]  # type: ignore[union-attr]


class FeatureInfo(list[dict[str, Any]]):
    """What is known of each map: its channels, its stride in pixels, and the module that it comes from."""

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [each["num_chs"] for each in self]

    def reduction(self) -> list[int]:
        """Pixels from one place of a map to the next, of each map."""
        return [each["reduction"] for each in self]

    def module_name(self) -> list[str]:
        """Each map's module in the model."""
        return [each["module"] for each in self]


class FeatureMaps(nn.Module):
    """A classifier without its head, called as maps(images (B, in_chans, h, w)) → a list of maps (B, C, H, W).

    Args:
        model: The classifier, of which what is not needed is removed.
        out_indices: As :func:`chosen_stages`.

    Attributes:
        feature_info: The :class:`FeatureInfo` of the maps.
    """

    def __init__(self, model: GSPNClassifier, out_indices: Sequence[int] | int | None = None) -> None:
        super().__init__()
        self.out_indices = sorted(set(chosen_stages(len(model.stages), out_indices)))
        self.feature_info = FeatureInfo(model.feature_info[i] for i in self.out_indices)
        model.prune_intermediate_layers(self.out_indices, prune_norm=True)
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(images, self.out_indices, intermediates_only=True)
