"""Draw images of texts: `python generate_t2i.py "a red 3 left of a blue 7" --model pipeline-folder --out image.png`."""

from gspn_dit.commands import run

if __name__ == "__main__":
    run("generate", prog="generate_t2i.py")
