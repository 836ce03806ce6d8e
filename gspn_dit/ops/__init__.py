"""The GSPN operator: 2D linear propagation by line scans. `python -m gspn_dit.ops` says which kernels run here.

`from gspn_dit.ops import propagate` registers it with torch, which a program saved by torch.export needs.
"""

from gspn_dit.exports import on_demand

_EXPORTS = {"propagate": "gspn_dit.ops.operator"}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = on_demand(__name__, _EXPORTS)
