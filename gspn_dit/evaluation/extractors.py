"""What turns images into features, and which of its outputs mean what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gspn_dit.errors import InputError
from gspn_dit.evaluation.classifiers import CLASSIFIERS, check_features
from gspn_dit.extras import require_extras
from gspn_dit.storage.files import sha256
from gspn_dit.storage.packaged import PACKAGED_CLASSIFIERS

if TYPE_CHECKING:
    from torch_fidelity import FeatureExtractorBase


@dataclass(frozen=True)
class Extractor:
    """A feature extractor, and which of its outputs mean what.

    Args:
        name: `inception`, or the name of a classifier.
        network: A torch-fidelity extractor: takes uint8 (B, 3, H, W), gives a tuple of float32 (B, width), one
            per layer that was asked for.
        weights: The file its weights came from.
        frechet_key: What a Fréchet distance of these features is called: `fid` for Inception's, `fd` for others.
        score_key: What the Inception Score's formula gives of these logits: `inception_score` or `classifier_score`.
        features: Layer of the Fréchet distance, and of precision and recall.
        logits: Layer of that score.
        spatial: Layer of sFID, if it has one.
        image_size: The only side of images it takes, or None for any.
        class_names: Of its logits, if they are classes that samples may be asked for; else None.
    """

    name: str
    network: FeatureExtractorBase
    weights: Path
    frechet_key: str
    score_key: str
    features: str
    logits: str
    spatial: str | None = None
    image_size: int | None = None
    class_names: Sequence[str] | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Every layer of uint8 images (B, 3, H, W) on the device, by its name: float32 (B, width).

        In float32 throughout, without the TF32 that CUDA convolutions may take by default.
        """
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.network.convert_features_tuple_to_dict(self.network(images))

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights file, in hex."""
        return sha256(self.weights)


def create_extractor(name: str, weights: str | None = None, *, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of that name, in eval mode on the device.

    Args:
        name: `inception`, torch-fidelity's InceptionV3 of the published FID; or the name of a classifier, `digits` or
            `photos` or one that was registered.
        weights: File of its weights. None takes a classifier's packaged ones, and for `inception` torch-fidelity's
            published file from torch.hub's cache, downloading it if it is not there.

    Raises:
        InputError: If there are no features of that name, the file is missing or is not that network's weights, or
            neither can be had.
    """
    check_features("features", name)
    require_extras("eval")
    from gspn_dit.evaluation.networks import InceptionFeatures, create_network, published_inception_weights

    if weights is not None and not Path(weights).is_file():
        raise InputError("no such file", argument="weights", value=weights)
    if name in CLASSIFIERS:
        file = Path(weights) if weights else PACKAGED_CLASSIFIERS.get(name)
        if file is None:
            raise InputError(
                f"{name} has no packaged weights", argument="weights", value=None, remedy="name its file with --weights"
            )
        kind, network = CLASSIFIERS.load(name), create_network(name, file, device)
        only = {"image_size": kind.only_size, "class_names": kind.class_names}
        return Extractor(name, network, file, "fd", "classifier_score", *network.features_list, **only)
    file = Path(weights) if weights else published_inception_weights()
    network = create_network(name, file, device, InceptionFeatures.SPATIAL)
    return Extractor(name, network, file, "fid", "inception_score", *network.layers)
