"""Draw images from a trained model: `python sample.py --model runs/digits --class-labels 3,7 --out grid.png`."""

from gspn_dit.commands import run

if __name__ == "__main__":
    run("sample", prog="sample.py")
