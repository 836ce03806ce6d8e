"""Options of the commands that say what there is: models, and kernels of this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ModelsOptions:
    """Models: which ones to list.

    Args:
        names: Models to count, for example `[gspn-dit-xl-2,gspn-grouped-t]`; all if not given.
    """

    names: list[str] | None = None


@dataclass
class OpsOptions:
    """Operator: its kernels on this machine.

    Args:
        require: Look for this backend only, for example `native-cuda`, and fail if it is missing.
    """

    require: str | None = None
