"""Things that are found by their names and imported when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from gspn_dit.errors import InputError, warn


class Registry:
    """Names, and where in which module each of them is: "module:object".

    The names are those of a table, those that :meth:`register` adds, and those that installed packages declare as
    entry points of the group. Nothing is imported before :meth:`load`.

    Args:
        group: Entry point group, for example `gspn_dit.sources`.
        table: The names that this package brings.
    """

    def __init__(self, group: str, table: Mapping[str, str]) -> None:
        self.group = group
        self._table = dict(table)

    def register(self, name: str, place: str) -> None:
        """Add a name for what is at `place`, "module:object". Raises ValueError if the name is taken."""
        if name in self:
            raise ValueError(f"{name!r} is taken: it names {self._place(name)}")
        self._table[name] = place

    def __contains__(self, name: object) -> bool:
        return name in self._table or name in self._declared

    def __iter__(self) -> Iterator[str]:
        yield from self._table
        yield from (name for name in self._declared if name not in self._table)

    def load(self, name: str) -> Any:
        """The object of a name.

        Raises KeyError for a name that is not there, what the import of one of this package or a registered one raises,
        and :class:`InputError` for one that an installed package declares and that cannot be loaded.
        """
        if name in self._table:
            module, _, attribute = self._table[name].partition(":")
            return getattr(import_module(module), attribute)
        entry = self._declared[name]
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            package = entry.dist.name if entry.dist else "an installed package"
            raise InputError(
                f"{package} declares it as {entry.value}, which cannot be loaded ({error})",
                argument=self.group,
                value=name,
                remedy=f"mend or remove {package}",
            ) from error

    def _place(self, name: str) -> str:
        return self._table[name] if name in self._table else self._declared[name].value

    @cached_property
    def _declared(self) -> dict[str, EntryPoint]:
        """What installed packages declare, by name; one that is taken stays with the first, and a warning says so."""
        declared: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            taken = self._table.get(entry.name) or (declared[entry.name].value if entry.name in declared else None)
            if taken is None:
                declared[entry.name] = entry
            elif taken != entry.value:
                warn(f"{self.group}: {entry.value} is declared as {entry.name!r}, which names {taken}; it is left out")
        return declared


def quoted(names: Iterable[str]) -> str:
    """Names for a message: "`digits`, `photos`"."""
    return ", ".join(f"`{name}`" for name in names)
