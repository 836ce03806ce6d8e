"""The GSPN operator: 2D linear propagation by line scans. `python -m gspn_dit.ops` says which kernels run here."""

from gspn_dit.ops.propagate import propagate

__all__ = ["propagate"]
