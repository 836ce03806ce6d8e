"""Imports go one way: a room imports what stands below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gspn_dit"
# A room may import those of its own line's number and of lower ones.
FLOORS = {
    "ops": 1,
    "storage": 1,
    "conditioning": 1,
    "diffusion": 1,
    "text": 2,
    "layers": 2,
    "autoencoder": 2,
    "models": 3,
    "data": 4,
    "evaluation": 5,
    "inference": 6,
    "training": 7,
    "demo": 8,
    "commands": 9,
}


def imported(statements):
    """The modules that a file imports when it is imported; not those for the type checker or of a script."""
    for node in statements:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) not in ("TYPE_CHECKING", "__name__ == '__main__'"):
            yield from imported(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from imported(node.body)


def test_every_room_has_a_floor():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_nothing_above_it(room):
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imported(ast.parse(path.read_text()).body):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "gspn_dit" and other in FLOORS:
                assert FLOORS[other] <= FLOORS[room], f"{path.relative_to(PACKAGE)} imports {name}"
