"""Class-conditional diffusion transformers with GSPN line scans instead of attention."""

from importlib import import_module
from typing import Any

# Loaded when first asked for, so that `import gspn_dit` costs nothing. ModelMixin is here for diffusers, which finds
# out how to load a pipeline's component by looking for its base classes in the component's own top-level package.
_EXPORTS = {
    "propagate": "gspn_dit.ops",
    "create_model": "gspn_dit.models",
    "list_models": "gspn_dit.models",
    "DiT": "gspn_dit.models",
    "GSPN": "gspn_dit.models",
    "GSPNDiT": "gspn_dit.models",
    "GSPNDiTPipeline": "gspn_dit.pipeline",
    "ModelMixin": "diffusers",
}

__all__ = [name for name in _EXPORTS if name != "ModelMixin"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
