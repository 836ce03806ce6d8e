"""Make a reference file that samples are scored against: `python fid/reference.py --help`."""

from gspn_dit.commands import run

if __name__ == "__main__":
    run("reference", prog="fid/reference.py")
