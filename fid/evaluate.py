"""Score generated images: `python fid/evaluate.py --help`."""

from gspn_dit.config import command
from gspn_dit.fid.evaluate import Options, main

if __name__ == "__main__":
    command(main, Options, prog="fid/evaluate.py")
