"""Packages that this process shall not have, as where they were never installed."""

import sys
from importlib.machinery import PathFinder


def hide(*names: str) -> None:
    """From now on, packages and modules of these names are not found, by an import or by `find_spec`."""

    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            hidden = any(name == each or name.startswith(f"{each}.") for each in names)
            return None if hidden else PathFinder.find_spec(name, path, target)

    sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
