"""Train a diffusion transformer: `python train_dit.py --config configs/digits.yaml`, or under `accelerate launch`."""

from gspn_dit.commands import run

if __name__ == "__main__":
    run("train", prog="train_dit.py")
