"""Windows: where they lie, that a scan in them is one of maps of their own, and what shifted grids connect."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from gspn_dit.errors import InputError
from gspn_dit.ops import propagate
from gspn_dit.ops.reference import borders

BACKENDS = ("reference", "native-cpu")
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
    (20, 35, 16, 8),
    (33, 23, 20, 13),
    (70, 30, 32, 16),
]


def operands(height: int, width: int, batch: int = 2, groups: int = GROUPS) -> dict[str, Tensor]:
    """Random operands of `propagate` in double precision, all that there are."""
    torch.manual_seed(0)
    tokens = (batch, height, width)
    shapes = {
        "x": (*tokens, CHANNELS),
        "gates": (*tokens, 4, 3, groups),
        "input_gate": (*tokens, 4, groups),
        "output_gate": (*tokens, 4, groups),
        "decay": (4, CHANNELS),
        "scale": (4, CHANNELS),
    }
    made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return made | {"decay": made["decay"].sigmoid()}


def window_of(lines: int, window: int, shift: int) -> Tensor:
    """The number of the window that every line is in."""
    return (torch.arange(lines) - shift).div(window, rounding_mode="floor")


def weighted_sum(y: Tensor) -> Tensor:
    """Σ y with weights from -1 to 1, so that every element has a gradient of its own."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


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
    starts = borders(lines, window, shift)
    assert starts == [0, *(line for line in range(1, lines) if (line - shift) % window == 0), lines]
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    assert all(length == window for length in lengths[1:-1]) and max(lengths) <= window


@pytest.mark.parametrize("shift", [0, 3, 7])
@pytest.mark.parametrize("lines", [1, 7, 8])
def test_an_axis_no_longer_than_a_window_is_one_window_whatever_the_shift(lines, shift):
    assert borders(lines, 8, shift) == [0, lines]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0: wanted None or a whole number of tokens, 1 or more"),
        ({"window": 2.0}, "window=2.0: wanted None or a whole number"),
        ({"window": True}, "window=True: wanted None or a whole number"),
        ({"window": 4, "shift": 4}, "shift=4: wanted a whole number from 0, below window=4"),
        ({"window": 4, "shift": -1}, "shift=-1: wanted"),
        ({"window": 4, "shift": 0.5}, "shift=0.5: wanted"),
        ({"shift": 1}, "shift=1: wanted 0 without a window"),
        ({"chunk": 4, "shift": 2}, "shift=2: wanted 0 without a window"),
        ({"window": 4, "chunk": 2}, "window=4: there is a chunk=2 too; give one of both"),
    ],
    ids=str,
)
def test_a_window_or_a_shift_that_cannot_be_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        propagate(**operands(8, 8), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, GROUPS, CHANNELS])
@pytest.mark.parametrize(("height", "width", "window", "shift"), MAPS)
def test_a_window_is_a_map_of_its_own(backend, groups, height, width, window, shift):
    """Scanned alone, cut out of all operands: y and all gradients."""
    given = {k: v.requires_grad_() for k, v in operands(height, width, 1, groups).items()}
    y = propagate(**given, window=window, shift=shift, backend=backend)
    rows = window_of(height, window, shift if height > window else 0)
    columns = window_of(width, window, shift if width > window else 0)
    expected = torch.zeros_like(y)
    for i, j in itertools.product(rows.unique(), columns.unique()):
        own = {k: v[:, rows == i][:, :, columns == j] for k, v in given.items() if v.ndim > 2}
        mask = (rows == i)[:, None] & (columns == j)
        alone = propagate(**given | own, backend="reference")
        expected = expected.masked_scatter(mask[None, :, :, None], alone)
    gradients = [torch.autograd.grad(weighted_sum(result), list(given.values())) for result in (y, expected)]
    torch.testing.assert_close(y, expected)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [24, 64])
def test_every_element_type_has_windows_on_the_cpu(dtype, channels):
    """Whole vectors of channels, and some that are not full."""
    torch.manual_seed(0)
    shapes = (1, 19, 13, channels), (1, 19, 13, 4, 3, 1), (1, 19, 13, 4, 1)
    given = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    y = propagate(*given, window=8, shift=3, backend="native-cpu")
    expected = propagate(*exact, window=8, shift=3, backend="reference")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    ours, theirs = (torch.autograd.grad(weighted_sum(result), of) for result, of in ((y, given), (expected, exact)))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double() - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("height", "width", "window", "shift"), [m for m in MAPS if min(m[:2]) > m[2]])
def test_windows_are_chunks_whose_lines_end_at_the_borders_and_have_their_gradients(
    backend, height, width, window, shift
):
    results = []
    for scan in (functools.partial(propagate, window=window, shift=shift, backend=backend), masked):
        given = {k: v.requires_grad_() for k, v in operands(height, width).items()}
        y = scan(given, window, shift) if scan is masked else scan(**given)
        weighted_sum(y).backward()
        results.append([y, *(v.grad for v in given.values())])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 8), (8, 3)])
@pytest.mark.parametrize("shift", [0, 4])
def test_windows_as_large_as_the_map_are_the_scan_of_the_map_bit_for_bit(backend, height, width, shift):
    given = {k: v.float() for k, v in operands(height, width).items()}
    in_windows = propagate(**given, window=8, shift=shift, backend=backend)
    assert torch.equal(in_windows, propagate(**given, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0, 2])
def test_what_a_token_does_ends_at_its_windows_borders(backend, shift):
    given = operands(9, 7, batch=1)
    given["x"].requires_grad_()
    y = propagate(**given, window=4, shift=shift, backend=backend)
    for row, column in [(0, 0), (3, 4), (5, 2), (8, 6)]:
        (reach,) = torch.autograd.grad(y[0, row, column].sum(), given["x"], retain_graph=True)
        rows, columns = window_of(9, 4, shift), window_of(7, 4, shift)
        window = (rows == rows[row])[:, None] & (columns == columns[column])
        assert torch.equal(reach[0].abs().sum(-1) > 0, window)


def test_a_shifted_grid_connects_the_windows_of_the_grid_before_it():
    given = operands(8, 8, batch=1)
    start = given["x"].requires_grad_()
    first = given | {"x": propagate(**given, window=4)}
    for second, connected in [(0, 4), (2, 8)]:  # rows and columns that reach the token
        y = propagate(**first, window=4, shift=second)
        (reach,) = torch.autograd.grad(y[0, 2, 2].sum(), start, retain_graph=True)
        assert (reach[0].abs().sum(-1) > 0).nonzero().amax(0).tolist() == [connected - 1] * 2


@pytest.mark.parametrize("directions", [("down", "up"), ("left",)])
def test_windows_take_the_operators_options(directions):
    given = operands(6, 6)
    some = [("down", "up", "right", "left").index(direction) for direction in directions]
    of_tokens = [given["x"], *(given[name][:, :, :, some] for name in ("gates", "input_gate"))]
    options = {"decay": given["decay"][some], "directions": directions, "direct": given["scale"][0]}
    y = propagate(*of_tokens, **options, window=3)
    corner = propagate(*(each[:, 3:, :3] for each in of_tokens), **options)
    torch.testing.assert_close(y[:, 3:, :3], corner)
