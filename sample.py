"""Draw images from a trained model: `python sample.py --model runs/digits --class-labels 3,7 --out grid.png`."""

from gspn_dit.options import command
from gspn_dit.sample import SampleOptions, main

if __name__ == "__main__":
    command(main, SampleOptions, prog="sample.py", continues=True)
