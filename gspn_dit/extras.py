"""What `pip install "gspn-dit[NAME]"` adds to the core, and what is said where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

from gspn_dit.errors import InputError

# Modules that the code of an extra cannot do without; pyproject.toml has the packages that bring them.
EXTRAS = {
    "cli": ("docstring_parser", "jsonargparse"),
    "train": ("accelerate", "docstring_parser", "jsonargparse", "matplotlib"),
    "eval": ("accelerate", "docstring_parser", "jsonargparse", "scipy", "torch_fidelity"),
    "timm": ("timm",),
    "t2i": ("transformers",),
    "ode": ("torchdiffeq",),
    "demo": ("mlxtend", "skimage"),
}


def require_extras(*extras: str) -> None:
    """Raise :class:`InputError` with the command that installs them if modules of these extras are missing."""
    missing = {extra: [name for name in EXTRAS[extra] if not _is_here(name)] for extra in extras}
    if lacking := [extra for extra in extras if missing[extra]]:
        modules = sorted({name for extra in lacking for name in missing[extra]})
        verb = "is" if len(modules) == 1 else "are"
        raise InputError(
            f"{' and '.join(modules)} {verb} not installed",
            remedy=f'`pip install "gspn-dit[{",".join(lacking)}]"` brings {"it" if len(modules) == 1 else "them"}',
        )


def _is_here(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except ValueError:  # it is in sys.modules as None, or without a spec
        return False
