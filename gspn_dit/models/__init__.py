"""The networks: `dit` (the baseline), `gspn` (the paper's) and `gspn-dit` (ours), by name or by class."""

from gspn_dit.exports import on_demand

_EXPORTS = {
    "DiT": "gspn_dit.models.dit",
    "GSPN": "gspn_dit.models.gspn",
    "GSPNDiT": "gspn_dit.models.gspn_dit",
    "create_model": "gspn_dit.models.registry",
    "list_models": "gspn_dit.models.registry",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = on_demand(__name__, _EXPORTS)
