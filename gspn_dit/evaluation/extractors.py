"""What turns images into features: torch-fidelity extractors whose weights are checked before they are used.

torch-fidelity 0.4 unpickles a weights file with `weights_only=False`, which runs whatever code the file carries, so no
file from outside reaches it: ours are opened here, as plain tensors.
"""

from __future__ import annotations

import io
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3, register_feature_extractor
from torch_fidelity import feature_extractor_inceptionv3 as published
from torch_fidelity.utils import create_feature_extractor

from gspn_dit.demo.classifier import Classifier, DigitsClassifier, PhotosClassifier
from gspn_dit.demo.packaged import packaged
from gspn_dit.errors import InputError
from gspn_dit.storage.files import sha256

SILENCE = 10  # seconds without a word from a server, after which it is not waited for
FeatureName = Literal["inception", "digits", "photos"]


@dataclass(frozen=True)
class Extractor:
    """A feature extractor, and which of its outputs mean what.

    Args:
        name: `inception`, `digits` or `photos`.
        network: Takes uint8 (B, 3, H, W), gives a tuple of float32 (B, width), one for each layer asked for.
        weights: The file its weights came from.
        frechet_key: What a Fréchet distance of these features is called: `fid` for Inception's, `fd` for others.
        score_key: What the Inception Score's formula gives of these logits: `inception_score` or `classifier_score`.
        features: Layer of the Fréchet distance, and of precision and recall.
        logits: Layer of that score.
        spatial: Layer of sFID, if it has one.
        image_size: The only side of images it takes, or None for any.
        class_names: Of its logits, if they are classes that samples may be asked for; else None.
    """

    name: FeatureName
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


def create_extractor(name: FeatureName, weights: str | None = None, *, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of that name, in eval mode on the device.

    Args:
        name: `inception`, torch-fidelity's InceptionV3 of the published FID; or `digits` or `photos`, the classifier
            of that data set.
        weights: File of its weights. None takes a classifier's packaged ones, and for `inception` torch-fidelity's
            published file from torch.hub's cache, downloading it if it is not there.

    Raises:
        InputError: If the file is missing or is not that network's weights, or can be had neither way.
    """
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"weights={weights}: no such file")
    if name in CLASSIFIER_FEATURES:
        features = CLASSIFIER_FEATURES[name]
        file = Path(weights) if weights else packaged(f"{name}_classifier.safetensors")
        network = _create(features, file, device)
        only = {"image_size": features.only_size, "class_names": features.kind.class_names}
        return Extractor(name, network, file, "fd", "classifier_score", *network.features_list, **only)
    file = Path(weights) if weights else published_inception_weights()
    network = _create(InceptionFeatures, file, device, InceptionFeatures.SPATIAL)
    return Extractor(name, network, file, "fid", "inception_score", *network.layers)


class InceptionFeatures(FeatureExtractorInceptionV3):
    """torch-fidelity's InceptionV3 (the TensorFlow network of the published FID, Heusel et al., arXiv 1706.08500).

    Beside torch-fidelity's layers it gives `mixed_6`, the 2023 spatial features of sFID (Nash et al., arXiv
    2103.03841) as ADM's suite takes them: the first 7 channels of the tensor `mixed_6/conv:0`, 17×17×192, flattened
    with the channel running fastest, so that `mu_s` and `sigma_s` of the suite's own files line up.

    What is certain: torch-fidelity's weights come from the suite's graph, and its script that converts them,
    util_convert_inception_weights.py, puts `mixed_6/conv/conv2d_params` and `mixed_6/conv/batchnorm` into
    `Mixed_6d.branch1x1`, the first 192 channels of its block. What is inferred: `mixed_6/conv:0` is the output of that
    whole branch, after batch norm and ReLU, for published listings of the graph's operations give each convolution's
    scope as Conv2D, batchnorm, CheckNumerics, control_dependency, and then an operation of the scope's own name, the
    only one that can be the ReLU. What could not be checked for want of graph and weights: a published sFID.
    """

    SPATIAL = "mixed_6"
    SPATIAL_CHANNELS = 7

    def __init__(self, name: str, features_list: Sequence[str], feature_extractor_weights_path: str, **options) -> None:
        checked = io.BytesIO()
        torch.save(_plain_tensors(Path(feature_extractor_weights_path)), checked)
        checked.seek(0)
        published_layers = [layer for layer in features_list if layer != self.SPATIAL]
        try:
            super().__init__(name, published_layers, feature_extractor_weights_path=checked, **options)
        except RuntimeError as error:  # load_state_dict's, of one line a key
            raise InputError(
                f"weights={feature_extractor_weights_path}: not torch-fidelity's InceptionV3 "
                f"({' '.join(str(error).split())[:200]} …); wanted {_published_name()}"
            ) from error
        self.layers = tuple(features_list)
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(self.features_list, super().forward(images), strict=True))
        if self.SPATIAL in self.layers:
            found[self.SPATIAL] = self.spatial
        return tuple(found[layer] for layer in self.layers)

    def get_requested_features_list(self) -> tuple[str, ...]:
        return self.layers

    def convert_features_tuple_to_dict(self, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(self.layers, features, strict=True))

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        first = output[:, : self.SPATIAL_CHANNELS].permute(0, 2, 3, 1)  # (B, 17, 17, 7)
        self.spatial = first.flatten(1).to(torch.float32)


class ClassifierFeatures(FeatureExtractorBase):
    """A packaged classifier as a torch-fidelity extractor: layers `64` (penultimate) and `logits`.

    Attributes:
        kind: The classifier.
        only_size: The only side of images it takes, or None for any.
    """

    kind: type[Classifier]
    only_size: int | None = None

    def __init__(self, name: str, features_list: Sequence[str], feature_extractor_weights_path: str, **_) -> None:
        super().__init__(name, features_list)
        self.classifier = self.kind.load(feature_extractor_weights_path)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.classifier.features(images)
        layers = {"64": features, "logits": self.classifier.classify(features)}
        return tuple(layers[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "64"


class DigitsFeatures(ClassifierFeatures):
    """Of the digits classifier."""

    kind, only_size = DigitsClassifier, DigitsClassifier.image_size


class PhotosFeatures(ClassifierFeatures):
    """Of the photos classifier, which resizes images of any size to 64×64 pixels."""

    kind = PhotosClassifier


CLASSIFIER_FEATURES = {"digits": DigitsFeatures, "photos": PhotosFeatures}
REGISTERED = {
    InceptionFeatures: "gspn-dit-inception",
    DigitsFeatures: "gspn-dit-digits",
    PhotosFeatures: "gspn-dit-photos",
}
for _extractor, _name in REGISTERED.items():
    register_feature_extractor(_name, _extractor)


def published_inception_weights() -> Path:
    """torch-fidelity's weights file in torch.hub's cache, downloaded and checked against its hash if not there yet.

    Raises:
        InputError: If it cannot be downloaded; the message says what to fetch and where to put it.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", _published_name())
    if file.exists():
        return file
    url = published.URL_INCEPTION_V3
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)  # torch.hub has none of its own: where packets are dropped it would wait minutes
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rpartition("-")[2])
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another hash than the name's
        what = f"{urlsplit(url).hostname} cannot be reached" if _no_answer(error) else "could not be downloaded"
        raise InputError(
            f"weights=None: the Inception weights are not here, and {what} ({getattr(error, 'reason', error)}); "
            f"name your copy with --weights, or fetch {url} and put it at {file}"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    return file


def _no_answer(error: Exception) -> bool:
    """Whether a download failed before a server answered, or because it fell silent."""
    return isinstance(error, URLError | TimeoutError | ConnectionError) and not isinstance(error, HTTPError)


def _create(
    extractor: type[FeatureExtractorBase], file: Path, device: torch.device | str, *others: str
) -> FeatureExtractorBase:
    """The network with the layers of the Fréchet distance and the Inception Score, in that order, and others."""
    layers = [*(extractor.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")), *others]
    network = create_feature_extractor(
        REGISTERED[extractor], layers, cuda=False, verbose=False, feature_extractor_weights_path=str(file)
    )
    return network.to(device)


def _published_name() -> str:
    return published.URL_INCEPTION_V3.rpartition("/")[2]


def _plain_tensors(file: Path) -> dict[str, Tensor]:
    """A state dict read without running anything the file carries."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile pickle raises is anyone's guess
        raise InputError(f"weights={file}: not a file of plain tensors; wanted {_published_name()}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"weights={file}: not a dictionary of tensors; wanted {_published_name()}")
    return weights
