"""Teach layers in the place of self-attention: `python distill_t2i.py --config configs/t2i/sd15.yaml`."""

from gspn_dit.commands import run

if __name__ == "__main__":
    run("distill-t2i", prog="distill_t2i.py")
