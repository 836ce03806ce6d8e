"""torch-fidelity's InceptionV3 at random weights, and images that it tells apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import FeatureExtractorInceptionV3, feature_extractor_inceptionv3


def random_inception(file: Path) -> FeatureExtractorInceptionV3:
    """The network with its pool features and logits, and its weights saved: activations stay alive, classes differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    with torch.inference_mode():  # logits of what images differ in, not of what all have in common
        features, _ = network(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
        common = torch.nn.functional.normalize(features.mean(dim=0), dim=0)
    with torch.no_grad():
        network.fc.weight -= network.fc.weight @ common[:, None] * common
        network.fc.weight *= 250
    torch.save(network.state_dict(), file)
    return network


def write_noise(folder: Path, low: int, high: int, seed: int, count: int) -> torch.Tensor:
    """PNGs of 8×8 blocks of colours in [low, high); the images as uint8 (count, 3, 64, 64)."""
    folder.mkdir(parents=True)
    blocks = np.random.default_rng(seed).integers(low, high, (count, 8, 8, 3), dtype=np.uint8)
    pixels = blocks.repeat(8, axis=1).repeat(8, axis=2)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
