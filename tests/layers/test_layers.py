"""The room `layers`: what it may import, and that chunks scale by one rule."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gspn_dit.layers
from gspn_dit.errors import InputError
from gspn_dit.layers.chunks import as_windows, scale_chunk
from gspn_dit.layers.windows import Window


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
    ("chunk", "scale", "scaled"),
    [
        (32, 2, 64),
        (32, 1.4142, 45),
        (2, 0.1, 1),
        (5, 0.5, 2),
        (None, 3.0, None),
        (Window(5, True), 0.5, Window(2, True)),
    ],
)
def test_a_scaled_chunk_has_whole_lines_and_at_least_one_and_a_global_scan_stays_global(chunk, scale, scaled):
    assert scale_chunk(chunk, scale) == scaled


def test_windows_have_the_chunks_for_sides_and_every_second_local_one_is_shifted():
    chunks = [8, None, 8, 8, None]
    assert as_windows(chunks, None) == chunks
    assert as_windows(chunks, "aligned") == [Window(8), None, Window(8), Window(8), None]
    assert as_windows(chunks, "shifted") == [Window(8), None, Window(8, shifted=True), Window(8), None]
    with pytest.raises(InputError, match="windows='swin': give one of aligned, shifted, or None"):
        as_windows(chunks, "swin")


@pytest.mark.parametrize(("window", "shift"), [(Window(8), 0), (Window(8, True), 4), (Window(5, True), 2)])
def test_a_shifted_window_is_shifted_by_half_its_side(window, shift):
    assert window.shift == shift
