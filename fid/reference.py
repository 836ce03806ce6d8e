"""Make a reference file that samples are scored against: `python fid/reference.py --help`."""

from gspn_dit.fid.reference import Options, main
from gspn_dit.options import command

if __name__ == "__main__":
    command(main, Options, prog="fid/reference.py")
