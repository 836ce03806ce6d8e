"""The room `layers`: what it may import, and that chunks scale by one rule."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gspn_dit.layers
from gspn_dit.layers.chunks import scale_chunk


def test_layers_know_the_operator_and_the_errors_alone():
    files = sorted(Path(gspn_dit.layers.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                room = module.removeprefix("gspn_dit.").split(".")[0]
                assert not module.startswith("gspn_dit") or room in ("ops", "errors", "layers"), f"{file}: {module}"


@pytest.mark.parametrize(
    ("chunk", "scale", "scaled"), [(32, 2, 64), (32, 1.4142, 45), (2, 0.1, 1), (5, 0.5, 2), (None, 3.0, None)]
)
def test_a_scaled_chunk_has_whole_lines_and_at_least_one_and_a_global_scan_stays_global(chunk, scale, scaled):
    assert scale_chunk(chunk, scale) == scaled
