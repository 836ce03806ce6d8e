"""Train an image classifier: `python train_classifier.py --config configs/classify/fashion.yaml`."""

from gspn_dit.commands import run

if __name__ == "__main__":
    run("train-classifier", prog="train_classifier.py")
