"""Packages that this process shall not have, as where they were never installed."""

import sys
from importlib.machinery import PathFinder


def hide(*names: str) -> None:
    """From now on, packages and modules of these names are not found, by an import or by `find_spec`."""

    at = next(i for i, each in enumerate(sys.meta_path) if isinstance(each, type) and issubclass(each, PathFinder))
    find_spec = sys.meta_path[at].find_spec

    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            hidden = any(name == each or name.startswith(f"{each}.") for each in names)
            return None if hidden else find_spec(name, path, target)

    sys.meta_path[at] = Finder
