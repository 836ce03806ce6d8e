"""The networks: `dit` (the baseline), `gspn` (the paper's) and `gspn-dit` (ours), by name or by class."""

from gspn_dit.models.dit import DiT
from gspn_dit.models.gspn import GSPN
from gspn_dit.models.gspn_dit import GSPNDiT
from gspn_dit.models.presets import create_model, list_models

__all__ = ["GSPN", "DiT", "GSPNDiT", "create_model", "list_models"]
