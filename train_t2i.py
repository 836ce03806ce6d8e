"""Train a text-to-image model of Stable Diffusion's kind: `python train_t2i.py --config configs/t2i/scenes-teacher.yaml`."""

from gspn_dit.commands import run

if __name__ == "__main__":
    run("train-t2i", prog="train_t2i.py")
