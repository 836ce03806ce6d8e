"""Score generated images: `python fid/evaluate.py --help`."""

from gspn_dit.commands import run

if __name__ == "__main__":
    run("evaluate", prog="fid/evaluate.py")
