"""Train a diffusion transformer: `python train_dit.py --config configs/digits.yaml`, or under `accelerate launch`."""

from gspn_dit.config import Config
from gspn_dit.options import command
from gspn_dit.training.loop import main

if __name__ == "__main__":
    command(main, Config, prog="train_dit.py")
