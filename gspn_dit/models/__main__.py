"""`gspn-dit models`: the table of models."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("models", prog="python -m gspn_dit.models")
    raise SystemExit

from typing import TYPE_CHECKING

import torch

from gspn_dit.errors import renamed
from gspn_dit.models.classifier import SIZES, create_classifier
from gspn_dit.models.macs import count_macs
from gspn_dit.models.registry import create_model, find_preset, list_models

if TYPE_CHECKING:
    from gspn_dit.commands import ModelsOptions as Options


def main(options: Options) -> None:
    """List models: name, parameters, and multiply-accumulates (GMACs) of one image.

    They are given at 256 and 512 pixels a side; of a classifier at the size it is made for, and at twice that.
    """
    names = options.names or [*list_models(), *SIZES]
    with renamed(name="names"):
        for name in names:
            if name not in SIZES:
                find_preset(name)
    if of_latents := [name for name in names if name not in SIZES]:
        print(f"{'name':<18}{'parameters':>14}{'GMACs at 256':>14}{'at 512':>10}")
    for name in of_latents:
        with torch.device("meta"):
            model = create_model(name)
        small, large = (f"{count_macs(model, (side, side)) / 1e9:.1f}" for side in (32, 64))  # latents, 8× smaller
        print(f"{name:<18}{model.num_parameters():>14,}{small:>14}{large:>10}", flush=True)
    if classifiers := [name for name in names if name in SIZES]:
        print(f"{'classifier':<18}{'parameters':>14}{'GMACs':>14}{'at twice':>10}{'pixels':>8}")
    for name in classifiers:
        with torch.device("meta"):
            network = create_classifier(name)
        side = network.pretrained_cfg["input_size"][-1]
        small, large = (f"{count_macs(network, (each, each)) / 1e9:.2f}" for each in (side, 2 * side))
        print(f"{name:<18}{network.num_parameters():>14,}{small:>14}{large:>10}{side:>8}", flush=True)
