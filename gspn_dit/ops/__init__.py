"""The GSPN operator: 2D linear propagation by line scans. `gspn-dit ops` says which backends run on this machine.

`from gspn_dit.ops import propagate` registers it with torch, which a program saved by torch.export needs. A backend of
your own is an object as `Backend` describes it, handed to `register`. `gspn_dit.ops.passes` has Triton kernels for what
else a block does.
"""

from gspn_dit.exports import on_demand

_EXPORTS = {
    "Backend": "gspn_dit.ops.backend",
    "Call": "gspn_dit.ops.backend",
    "FusesTail": "gspn_dit.ops.backend",
    "Status": "gspn_dit.ops.backend",
    "propagate": "gspn_dit.ops.operator",
    "register": "gspn_dit.ops.registry",
    "unregister": "gspn_dit.ops.registry",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = on_demand(__name__, _EXPORTS)
