"""Modules and commands of earlier versions: whoever asks for one is told where it is now."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec

_SUCCESSORS = {
    "gspn_dit.data.decode": "gspn_dit.autoencoder.decode",
    "gspn_dit.data.downsampling": "gspn_dit.autoencoder.downsampling",
    "gspn_dit.data.encode_moments": "gspn_dit.autoencoder.encode_moments",
    "gspn_dit.data.load_vae": "gspn_dit.autoencoder.load_vae",
    "gspn_dit.data.sample_posterior": "gspn_dit.autoencoder.sample_posterior",
    "gspn_dit.data.digits": "gspn_dit.demo.digits",
    "gspn_dit.data.imagefolder": "gspn_dit.data.image_folder",
    "gspn_dit.data.latents": "gspn_dit.data.latent_store",
    "gspn_dit.data.photos": "gspn_dit.demo.photos",
    "gspn_dit.data.quality": "gspn_dit.autoencoder.quality",
    "gspn_dit.data.tiling": "gspn_dit.autoencoder.tiling",
    "gspn_dit.data.vae": "gspn_dit.autoencoder.vae",
    "gspn_dit.drawing": "gspn_dit.inference.sample_folder",
    "gspn_dit.export": "gspn_dit.inference.export; the command is `gspn-dit export`",
    "gspn_dit.fid": "gspn_dit.evaluation; the commands are `gspn-dit evaluate` and `gspn-dit reference`, and "
    "`gspn-dit classifier` trains a classifier",
    "gspn_dit.files": "gspn_dit.storage.files",
    "gspn_dit.model_card": "gspn_dit.inference.model_card",
    "gspn_dit.models.chunks": "gspn_dit.layers.chunks",
    "gspn_dit.models.counting": "gspn_dit.models.macs",
    "gspn_dit.models.embeddings": "gspn_dit.layers.embeddings",
    "gspn_dit.models.layers": "gspn_dit.layers, a file for each kind of layer",
    "gspn_dit.models.mixers": "gspn_dit.layers.mixers",
    "gspn_dit.models.presets": "gspn_dit.models.registry",
    "gspn_dit.ops.backends": "gspn_dit.ops.registry",
    "gspn_dit.pictures": "gspn_dit.storage.pictures",
    "gspn_dit.pipeline": "gspn_dit.inference.pipeline; `from gspn_dit import GSPNDiTPipeline` finds it wherever it is",
    "gspn_dit.runs": "gspn_dit.storage.run_folder",
    "gspn_dit.sample": "gspn_dit.inference.sample; the command is `gspn-dit sample`",
    "gspn_dit.training.evaluation": "gspn_dit.training.evaluator",
    "gspn_dit.training.linear_start": "gspn_dit.demo.linear_start",
    "gspn_dit.training.processes": "gspn_dit.processes and gspn_dit.training.stop_request",
    "gspn_dit.training.setup": "gspn_dit.training.diffusion",
    "gspn_dit.training.small_vae": "gspn_dit.demo.small_vae; the command is `gspn-dit small-vae`",
    "gspn_dit.weights": "gspn_dit.storage.packaged",
}


class Successors:
    """An import finder that comes first: a folder that an old version has left would pass for an empty package."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Raise ModuleNotFoundError with the successor's name for a module that there was; None for any other."""
        if name in _SUCCESSORS:
            # without `name`, for which `from gspn_dit import export` would leave the reason out
            raise ModuleNotFoundError(f"{name} is now {_SUCCESSORS[name]}")
        return None


def tell_successors() -> None:
    """Install the finder, once."""
    if Successors not in sys.meta_path:
        sys.meta_path.insert(0, Successors)
