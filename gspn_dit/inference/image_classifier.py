"""A trained classifier, ready to be asked: its network, how pictures are prepared for it, its classes' names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gspn_dit.data.preparation import Preparation
from gspn_dit.errors import InputError
from gspn_dit.models.classifier import GSPNClassifier
from gspn_dit.storage.packaged import PACKAGED_IMAGE_CLASSIFIERS
from gspn_dit.storage.run_folder import Checkpoint, RunFolder


def load_classifier(path: str | os.PathLike) -> GSPNClassifier:
    """The averaged weights of a run's newest checkpoint, of one checkpoint, a model folder, or a packaged classifier.

    Raises :class:`InputError` if there is none of these, or its files cannot be read.
    """
    return GSPNClassifier.from_pretrained(model_folder(path))


def model_folder(path: str | os.PathLike) -> Path:
    """The folder with config.json and weights that a path or a packaged classifier's name stands for.

    Raises :class:`InputError` if there is none.
    """
    folder = PACKAGED_IMAGE_CLASSIFIERS.get(str(path), Path(path))
    if not folder.is_dir():
        names = " or ".join(PACKAGED_IMAGE_CLASSIFIERS)
        raise InputError(
            "no such folder",
            argument="model",
            value=str(path),
            wanted=f"a run, a checkpoint, the folder of a saved classifier, or {names}",
        )
    checkpoint, run = Checkpoint(folder), RunFolder(folder)
    if checkpoint.ema.is_dir():
        return checkpoint.ema
    if not run.exists:
        return folder
    if (newest := run.newest_checkpoint()) is None:
        raise InputError(
            "the run has no checkpoint yet",
            argument="model",
            value=str(path),
            remedy="it writes one every training.checkpoint_every steps",
        )
    return newest.ema


class ImageClassifier:
    """A classifier of pictures.

    Args:
        model: Its network, in evaluation mode.
        preparation: How pictures are prepared; if not given, as the network's `pretrained_cfg` says.

    Attributes:
        class_names: Name of each class; numbers where the model does not know names.
    """

    def __init__(self, model: GSPNClassifier, preparation: Preparation | None = None) -> None:
        self.model = model
        self.preparation = preparation or Preparation.of(model.pretrained_cfg)
        names: Sequence[object] = model.pretrained_cfg.get("label_names") or range(model.num_classes)
        self.class_names = [str(name) for name in names]

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> ImageClassifier:
        """That of :func:`load_classifier`, on a device. Raises as that does."""
        return cls(load_classifier(path).to(device))

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Probabilities of the classes (N, classes), float32 on the CPU, of pictures of any size and mode."""
        images = torch.stack([self.preparation(picture) for picture in pictures])
        return self.model(images.to(self.model.device)).float().softmax(1).cpu()
