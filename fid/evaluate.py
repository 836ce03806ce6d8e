"""Score generated images: `python fid/evaluate.py --help`."""

from gspn_dit.fid.evaluate import Options, main
from gspn_dit.options import command

if __name__ == "__main__":
    command(main, Options, prog="fid/evaluate.py")
