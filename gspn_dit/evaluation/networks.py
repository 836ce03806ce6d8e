"""The networks behind features, as torch-fidelity extractors whose weights are checked before they are used.

torch-fidelity 0.4 unpickles a weights file with `weights_only=False`, which runs whatever code the file carries, so no
file from outside reaches it: ours are opened here, as plain tensors.
"""

from __future__ import annotations

import io
import socket
from collections.abc import Sequence
from functools import cache
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3, register_feature_extractor
from torch_fidelity import feature_extractor_inceptionv3 as published
from torch_fidelity.utils import create_feature_extractor

from gspn_dit.errors import InputError
from gspn_dit.evaluation.classifiers import CLASSIFIERS, INCEPTION, Classifier

SILENCE = 10  # seconds without a word from a server, after which it is not waited for


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
                f"not torch-fidelity's InceptionV3 ({' '.join(str(error).split())[:200]} …)",
                argument="weights",
                value=feature_extractor_weights_path,
                wanted=_published_name(),
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
    """A classifier as a torch-fidelity extractor: layers `64` (penultimate, by their number) and `logits`.

    Attributes:
        kind: The classifier's class.
    """

    kind: type[Classifier]

    def __init__(self, name: str, features_list: Sequence[str], feature_extractor_weights_path: str, **_) -> None:
        super().__init__(name, features_list)
        self.classifier = self.kind.load(feature_extractor_weights_path)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.classifier.features(images)
        layers = {str(self.kind.num_features): features, "logits": self.classifier.classify(features)}
        return tuple(layers[name] for name in self.features_list)

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return str(cls.kind.num_features), "logits"

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        return "logits" if metric == "isc" else str(cls.kind.num_features)


@cache
def registered(name: str) -> type[FeatureExtractorBase]:
    """The extractor of the features called so, which torch-fidelity knows as `gspn-dit-NAME` from then on."""
    extractor: type[FeatureExtractorBase]
    if name == INCEPTION:
        extractor = InceptionFeatures
    else:
        extractor = type("ClassifierFeatures", (ClassifierFeatures,), {"kind": CLASSIFIERS.load(name)})
    register_feature_extractor(f"gspn-dit-{name}", extractor)
    return extractor


def create_network(name: str, weights: Path, device: torch.device | str, *others: str) -> FeatureExtractorBase:
    """The network of the features called so, in eval mode on the device.

    Its outputs are the layers of the Fréchet distance and of the Inception Score, in that order, and others.
    """
    extractor = registered(name)
    layers = [*(extractor.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")), *others]
    network = create_feature_extractor(
        f"gspn-dit-{name}", layers, cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
    )
    return network.to(device)


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
            f"the Inception weights are not here, and {what} ({getattr(error, 'reason', error)})",
            argument="weights",
            value=None,
            remedy=f"name your copy with --weights, or fetch {url} and put it at {file}",
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    return file


def _no_answer(error: Exception) -> bool:
    """Whether a download failed before a server answered, or because it fell silent."""
    return isinstance(error, URLError | TimeoutError | ConnectionError) and not isinstance(error, HTTPError)


def _published_name() -> str:
    return published.URL_INCEPTION_V3.rpartition("/")[2]


def _plain_tensors(file: Path) -> dict[str, Tensor]:
    """A state dict read without running anything the file carries."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile pickle raises is anyone's guess
        raise InputError(
            "not a file of plain tensors", argument="weights", value=file, wanted=f"{_published_name()}"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError("not a dictionary of tensors", argument="weights", value=file, wanted=_published_name())
    return weights
