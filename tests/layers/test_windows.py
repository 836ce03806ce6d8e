"""Windows: where they lie, that a scan in them is one of maps of their own, and what shifted grids connect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gspn_dit.errors import InputError
from gspn_dit.layers.mixers import GSPNMixer
from gspn_dit.layers.windows import Window, propagate_windows, window_runs
from gspn_dit.ops import propagate

CHANNELS, GROUPS = 6, 2
MAPS = [
    (8, 8, 4, 0),
    (8, 8, 4, 2),
    (9, 7, 4, 0),
    (9, 7, 4, 2),
    (10, 3, 4, 1),
    (5, 12, 3, 2),
    (6, 9, 3, 0),
    (4, 4, 1, 0),
]


def operands(height: int, width: int, batch: int = 2) -> dict[str, Tensor]:
    """Random operands of `propagate` in double precision, all that there are."""
    torch.manual_seed(0)
    tokens = (batch, height, width)
    shapes = {
        "x": (*tokens, CHANNELS),
        "gates": (*tokens, 4, 3, GROUPS),
        "input_gate": (*tokens, 4, GROUPS),
        "output_gate": (*tokens, 4, GROUPS),
        "decay": (4, CHANNELS),
        "scale": (4, CHANNELS),
    }
    made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return made | {"decay": made["decay"].sigmoid()}


def in_windows(operands: dict[str, Tensor], window: int | None, shift: int = 0) -> Tensor:
    of_tokens = (operands[name] for name in ("x", "gates", "input_gate", "output_gate"))
    return propagate_windows(*of_tokens, window=window, shift=shift, decay=operands["decay"], scale=operands["scale"])


def window_of(lines: int, window: int, shift: int) -> Tensor:
    """The number of the window that every line is in."""
    return (torch.arange(lines) - shift).div(window, rounding_mode="floor")


def masked(operands: dict[str, Tensor], window: int, shift: int) -> Tensor:
    """Windows by another way: chunks, with a logit of -∞ for the neighbours beyond a border of window or map.

    Rows and columns of zeros before the map shift the chunks' grid: a scan that comes from them holds 0.
    """
    before = (-shift) % window
    padded = {k: v for k, v in operands.items() if k in ("decay", "scale")}
    for name in operands.keys() - padded.keys():
        tokens = operands[name]
        wide = tokens.new_zeros(tokens.shape[0], *(side + before for side in tokens.shape[1:3]), *tokens.shape[3:])
        wide[:, before:, before:] = tokens
        padded[name] = wide
    gates = padded["gates"]
    height, width = gates.shape[1:3]
    rows, columns = torch.arange(height), torch.arange(width)
    infinite = float("-inf")
    gates[:, :, (columns % window == 0) | (columns == before), :2, 0] = infinite  # of down and up
    gates[:, :, columns % window == window - 1, :2, 2] = infinite
    gates[:, (rows % window == 0) | (rows == before), :, 2:, 0] = infinite  # of right and left
    gates[:, rows % window == window - 1, :, 2:, 2] = infinite
    return propagate(**padded, chunk=window)[:, before:, before:]


@pytest.mark.parametrize(("lines", "window", "shift"), [(32, 16, 0), (32, 16, 8), (33, 16, 8), (17, 16, 15), (5, 1, 0)])
def test_windows_cover_an_axis_once_and_no_two_that_follow_differ_but_at_the_edges(lines, window, shift):
    runs = window_runs(lines, window, shift)
    ends = [end for run in runs for end in range(run.start, run.stop, run.length)]
    borders = [line for line in range(1, lines) if (line - shift) % window == 0]
    assert ends == [0, *borders] and runs[-1].stop == lines
    assert len(runs) <= 3 and all(run.length == window for run in runs[1:-1])


@pytest.mark.parametrize("shift", [0, 3, 7])
@pytest.mark.parametrize("lines", [1, 7, 8])
def test_an_axis_no_longer_than_a_window_is_one_window_whatever_the_shift(lines, shift):
    (run,) = window_runs(lines, 8, shift)
    assert (run.start, run.length, run.count) == (0, lines, 1)


@pytest.mark.parametrize(
    ("window", "shift", "message"),
    [
        (0, 0, "window=0: give a number of lines from 1"),
        (4, 4, r"shift=4: give .* below window=4"),
        (4, -1, "shift=-1"),
    ],
)
def test_a_window_or_a_shift_that_cannot_be_is_refused(window, shift, message):
    with pytest.raises(InputError, match=message):
        in_windows(operands(8, 8), window, shift)


@pytest.mark.parametrize(("height", "width", "window", "shift"), MAPS)
def test_a_window_is_a_map_of_its_own(height, width, window, shift):
    """Scanned alone, row by row of windows."""
    given = operands(height, width)
    y = in_windows(given, window, shift)
    rows = window_of(height, window, shift if height > window else 0)
    columns = window_of(width, window, shift if width > window else 0)
    for i in rows.unique():
        for j in columns.unique():
            own = {k: v[:, rows == i][:, :, columns == j] for k, v in given.items() if v.ndim > 2}
            alone = propagate(**given | own)
            torch.testing.assert_close(y[:, rows == i][:, :, columns == j], alone)


@pytest.mark.parametrize(("height", "width", "window", "shift"), [m for m in MAPS if min(m[:2]) > m[2]])
def test_windows_are_chunks_whose_lines_end_at_the_borders_and_have_their_gradients(height, width, window, shift):
    results = []
    for scan in (in_windows, masked):
        given = {k: v.requires_grad_() for k, v in operands(height, width).items()}
        y = scan(given, window, shift)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append([y, *(v.grad for v in given.values())])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 8), (8, 3)])
@pytest.mark.parametrize("shift", [0, 4])
def test_windows_as_large_as_the_map_are_the_scan_of_the_map_bit_for_bit(height, width, shift):
    given = {k: v.float() for k, v in operands(height, width).items()}
    assert torch.equal(in_windows(given, 8, shift), propagate(**given))
    assert torch.equal(in_windows(given, None), propagate(**given))


@pytest.mark.parametrize("shift", [0, 2])
def test_what_a_token_does_ends_at_its_windows_borders(shift):
    given = operands(9, 7, batch=1)
    given["x"].requires_grad_()
    for row, column in [(0, 0), (3, 4), (5, 2), (8, 6)]:
        (reach,) = torch.autograd.grad(in_windows(given, 4, shift)[0, row, column].sum(), given["x"])
        rows, columns = window_of(9, 4, shift), window_of(7, 4, shift)
        window = (rows == rows[row])[:, None] & (columns == columns[column])
        assert torch.equal(reach[0].abs().sum(-1) > 0, window)


def test_a_shifted_grid_connects_the_windows_of_the_grid_before_it():
    given = operands(8, 8, batch=1)
    start = given["x"].requires_grad_()
    first = given | {"x": in_windows(given, 4)}
    for second, connected in [(0, 4), (2, 8)]:  # rows and columns that reach the token
        (reach,) = torch.autograd.grad(in_windows(first, 4, second)[0, 2, 2].sum(), start, retain_graph=True)
        assert (reach[0].abs().sum(-1) > 0).nonzero().amax(0).tolist() == [connected - 1] * 2


@pytest.mark.parametrize("directions", [("down", "up"), ("left",)])
def test_windows_take_the_operators_options(directions):
    given = operands(6, 6)
    some = [("down", "up", "right", "left").index(direction) for direction in directions]
    of_tokens = [given["x"], *(given[name][:, :, :, some] for name in ("gates", "input_gate"))]
    y = propagate_windows(*of_tokens, window=3, decay=given["decay"][some], directions=directions)
    corner = propagate(*(each[:, 3:, :3] for each in of_tokens), decay=given["decay"][some], directions=directions)
    torch.testing.assert_close(y[:, 3:, :3], corner)


@pytest.mark.slow
def test_a_mixer_of_shifted_windows_compiles_as_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer, value = GSPNMixer(8, 2), torch.randn(2, 9, 7, 8)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(value, Window(4, shifted=True)), mixer(value, Window(4, shifted=True)))
    assert not torch.allclose(compiled(value, Window(4)), mixer(value, Window(4, shifted=True)))
