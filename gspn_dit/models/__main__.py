"""`gspn-dit models`: the table of models."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from gspn_dit.commands import run

    run("models", prog="python -m gspn_dit.models")
    raise SystemExit

from typing import TYPE_CHECKING

import torch

from gspn_dit.errors import renamed
from gspn_dit.models.macs import count_macs
from gspn_dit.models.registry import create_model, find_preset, list_models

if TYPE_CHECKING:
    from gspn_dit.commands import ModelsOptions as Options


def main(options: Options) -> None:
    """List models: name, parameters, and multiply-accumulates (GMACs) of one image of 256 and 512 pixels a side."""
    names = options.names or list_models()
    with renamed(name="names"):
        for name in names:
            find_preset(name)
    print(f"{'name':<16}{'parameters':>14}{'GMACs at 256':>14}{'at 512':>10}")
    for name in names:
        with torch.device("meta"):
            model = create_model(name)
        small, large = (f"{count_macs(model, (side, side)) / 1e9:.1f}" for side in (32, 64))  # latents, 8× smaller
        print(f"{name:<16}{model.num_parameters():>14,}{small:>14}{large:>10}", flush=True)
