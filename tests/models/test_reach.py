"""Which tokens reach which: chunks that are local, global layers that are global, directions that turn with the map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gspn_dit.layers.gspn_core import GSPNCore
from gspn_dit.layers.mixers import GSPNMixer, Projections
from gspn_dit.layers.windows import Window
from gspn_dit.models import create_model
from gspn_dit.ops import propagate

HEIGHT, WIDTH, CHANNELS = 9, 7, 16
TOKENS = [(i, j) for i in range(HEIGHT) for j in range(WIDTH)]


def scan_layer(kind: str) -> nn.Module:
    """A layer in which tokens meet only in the scan: gspn's core, gspn-dit's mixer with a 1 × 1 filter."""
    torch.manual_seed(0)
    layer = GSPNCore(CHANNELS) if kind == "gspn" else GSPNMixer(CHANNELS, 2, Projections(conv_kernel=1))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def reaches(layer: nn.Module, chunk: int | None, tokens: list[tuple[int, int]]) -> torch.Tensor:
    """(len(tokens), HEIGHT, WIDTH): does the input at a token have a gradient from the output at the given token."""
    x = torch.randn(1, HEIGHT, WIDTH, CHANNELS).repeat(len(tokens), 1, 1, 1).requires_grad_()
    y = layer(x, chunk)
    sum(y[n, i, j].sum() for n, (i, j) in enumerate(tokens)).backward()
    return x.grad.abs().sum(-1) > 0


def chunks_of_a_forward(model: nn.Module, **options) -> list[int | Window | None]:
    """The chunk that each scanning layer is called with."""
    chunks = []
    for layer in model.modules():
        if isinstance(layer, GSPNCore | GSPNMixer):
            layer.register_forward_pre_hook(lambda layer, inputs: chunks.append(inputs[1]))
    with torch.no_grad():
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long), **options)
    return chunks


def in_reach(source: tuple[int, int], target: tuple[int, int], chunk: int | None) -> bool:
    """The scan along rows spreads one column a line within a chunk of rows, the scan along columns likewise."""
    down, across = abs(source[0] - target[0]), abs(source[1] - target[1])
    same_rows = chunk is None or source[0] // chunk == target[0] // chunk
    same_columns = chunk is None or source[1] // chunk == target[1] // chunk
    return (same_rows and across <= down) or (same_columns and down <= across)


@pytest.mark.parametrize("kind", ["gspn", "gspn-dit"])
@pytest.mark.parametrize("chunk", [None, 1, 2, 4, 9])
def test_a_layer_reaches_the_cones_of_its_chunks_and_nothing_else(kind, chunk):
    reach = reaches(scan_layer(kind), chunk, TOKENS)
    expected = torch.tensor([[in_reach(source, target, chunk) for source in TOKENS] for target in TOKENS])
    assert torch.equal(reach.flatten(1), expected)
    if chunk in (None, 9):
        assert expected.all()  # four cones make the plane: in a global layer every token reaches every token
    if chunk == 1:
        assert torch.equal(expected, torch.eye(len(TOKENS), dtype=torch.bool))


def test_chunks_are_fixed_to_the_map():
    """Row 3 meets row 2 and not row 4, from both sides, wherever the token lies."""
    reach = reaches(scan_layer("gspn"), 2, [(3, 3)])[0]
    assert reach[2, 3]
    assert not reach[4, 3]
    reach = reaches(scan_layer("gspn"), 2, [(4, 3)])[0]
    assert reach[5, 3]
    assert not reach[3, 3]


@pytest.mark.parametrize(
    "window", [Window(4), Window(4, shifted=True), Window(3, shifted=True), Window(9, shifted=True)]
)
def test_a_layer_of_windows_reaches_all_of_a_tokens_window_and_nothing_else(window):
    reach = reaches(scan_layer("gspn-dit"), window, TOKENS)
    shifts = [window.shift if side > window.side else 0 for side in (HEIGHT, WIDTH)]
    windows = [tuple((place - shift) // window.side for place, shift in zip(t, shifts, strict=True)) for t in TOKENS]
    expected = torch.tensor([[source == target for source in windows] for target in windows])
    assert torch.equal(reach.flatten(1), expected)


@pytest.mark.parametrize(("windows", "local_reach"), [("aligned", 8), ("shifted", 16)])
def test_windows_of_two_layers_meet_if_every_second_grid_is_shifted(windows, local_reach):
    """Without filters between them: how many rows and columns of 24 reach a token near its window of 8's corner."""
    torch.manual_seed(0)
    options = {"width": 16, "depth": 2, "num_groups": 1, "conv_kernel": 1, "chunk": 8, "global_layers": 0}
    model = create_model("gspn-dit-ti-1", sample_size=24, windows=windows, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    latents = torch.randn(1, 4, 24, 24, requires_grad=True)
    model(latents, torch.tensor([500.0]), torch.tensor([3]))[0, :, 7, 7].sum().backward()
    reach = latents.grad[0].abs().sum(0) > 0
    assert (reach.any(0).sum(), reach.any(1).sum()) == (local_reach, local_reach)


def test_a_model_hands_windows_to_its_local_layers_and_scales_them():
    assert chunks_of_a_forward(create_model("gspn-dit-ti-2", windows="aligned")) == [Window(32)] * 4 + [None] * 2
    scaled = chunks_of_a_forward(create_model("gspn-dit-ti-2", windows="shifted"), chunk_scale=0.25)
    assert scaled == [Window(8), Window(8, shifted=True)] * 2 + [None] * 2


@pytest.mark.parametrize("windows", ["aligned", "shifted"])
@torch.no_grad()
def test_windows_change_nothing_on_a_map_that_is_no_larger(windows):
    torch.manual_seed(0)
    model = create_model("gspn-dit-ti-1", width=16, num_groups=1, depth=3, chunk=8, windows=None)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    other = create_model("gspn-dit-ti-1", width=16, num_groups=1, depth=3, chunk=8, windows=windows)
    other.load_state_dict(model.state_dict())
    for height, width in [(8, 8), (5, 8)]:
        inputs = torch.randn(1, 4, height, width), torch.tensor([500.0]), torch.tensor([3])
        assert torch.equal(model(*inputs), other(*inputs))
    inputs = torch.randn(1, 4, 9, 8), torch.tensor([500.0]), torch.tensor([3])
    assert not torch.equal(model(*inputs), other(*inputs))


@pytest.mark.parametrize(
    ("name", "layers", "local_reach"),
    [
        # a block of gspn: 7 × 7 and 3 × 3 filters, and one line of a chunk of 2
        ("gspn-ti-1", {"width": 16, "depth": 3}, 3 * (3 + 1 + 1)),
        # a block of gspn-dit: a 3 × 3 filter, and up to three lines of a chunk of 4
        ("gspn-dit-ti-1", {"width": 16, "depth": 3, "num_groups": 1, "chunk": 4}, 3 * (1 + 3)),
    ],
)
def test_a_model_is_local_until_its_last_two_layers(name, layers, local_reach):
    side = 36
    reach = {}
    for global_layers in (0, 2):
        torch.manual_seed(0)
        model = create_model(name, sample_size=side, global_layers=global_layers, **layers).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        latents = torch.randn(1, 4, side, side, requires_grad=True)
        model(latents, torch.tensor([500.0]), torch.tensor([3]))[0, :, 0, 0].sum().backward()
        reach[global_layers] = latents.grad[0].abs().sum(0) > 0
    rows, columns = reach[0].nonzero().unbind(1)
    assert 3 < max(rows.max(), columns.max()) <= local_reach < side - 1
    assert reach[2].all()


def test_a_new_gspn_dit_has_shifted_windows_but_for_its_last_two_layers():
    local = [Window(32), Window(32, shifted=True)] * 2
    assert chunks_of_a_forward(create_model("gspn-dit-ti-2")) == [*local, None, None]
    assert chunks_of_a_forward(create_model("gspn-dit-ti-2", windows=None)) == [32, 32, 32, 32, None, None]


def test_layers_can_be_made_global_by_index():
    chunks = chunks_of_a_forward(create_model("gspn-ti-2", global_layers=[0, -2]))
    assert chunks == [None, 2, 2, 2, 2, None, 2]
    assert set(chunks_of_a_forward(create_model("gspn-ti-2", chunk=None))) == {None}


# Turning a map a quarter to the left makes the scan in each direction the scan in another; where the line's own
# coordinate then runs the other way, the neighbours (-1, 0, +1) change places.
DOWN, UP, RIGHT, LEFT = range(4)
TURNED = {DOWN: (RIGHT, True), RIGHT: (UP, False), UP: (LEFT, True), LEFT: (DOWN, False)}


def turn_directions(by_direction: torch.Tensor, neighbours: bool = False) -> torch.Tensor:
    """Rearrange parameters (4, …), or (4, 3, …) with neighbours, as the turn does the directions."""
    turned = torch.empty_like(by_direction)
    for direction, (becomes, flipped) in TURNED.items():
        turned[becomes] = by_direction[direction].flip(0) if neighbours and flipped else by_direction[direction]
    return turned


def turned_gspn(core: GSPNCore) -> GSPNCore:
    turned = scan_layer("gspn")
    turned.load_state_dict(core.state_dict())
    gates = core.gates.weight.view(4, 3, -1)
    turned.gates.weight.copy_(turn_directions(gates, neighbours=True).view_as(core.gates.weight))
    for name in ("lam", "out", "skip"):
        weight = getattr(core, name).weight
        getattr(turned, name).weight.copy_(turn_directions(weight.view(4, -1)).view_as(weight))
    turned.merge.copy_(turn_directions(core.merge))
    return turned


def turned_gspn_dit(mixer: GSPNMixer) -> GSPNMixer:
    turned = scan_layer("gspn-dit")
    turned.load_state_dict(mixer.state_dict())
    for name in ("log_rate", "scale"):
        getattr(turned, name).copy_(turn_directions(getattr(mixer, name)))
    for name in ("weight", "bias"):
        before = getattr(mixer.head[1], name)
        by_group = before.view(2, 16, -1).movedim(1, 0)  # (16, G, …): 4 × 3 logits, 4 λ
        gates = turn_directions(by_group[:12].unflatten(0, (4, 3)), neighbours=True).flatten(0, 1)
        after = torch.cat([gates, turn_directions(by_group[12:])]).movedim(0, 1)
        getattr(turned.head[1], name).copy_(after.reshape(before.shape))
    return turned


@pytest.mark.parametrize(("kind", "turn"), [("gspn", turned_gspn), ("gspn-dit", turned_gspn_dit)])
@pytest.mark.parametrize("chunk", [None, 2])
@torch.no_grad()
def test_turning_the_map_and_the_directions_turns_the_output(kind, turn, chunk):
    layer = scan_layer(kind)
    x = torch.randn(2, 8, 6, CHANNELS)
    turned_output = turn(layer)(x.rot90(1, (1, 2)), chunk)
    torch.testing.assert_close(turned_output, layer(x, chunk).rot90(1, (1, 2)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(layer(x.rot90(1, (1, 2)), chunk), layer(x, chunk).rot90(1, (1, 2)), atol=1e-1)


@torch.no_grad()
def test_the_core_is_the_sum_of_its_four_scans_and_skips():
    """y = Σ_k s_k (u_k ⊙ h_k + D_k ⊙ x), term by term, where the core folds s into the weights of u and D."""
    core = scan_layer("gspn")
    x = torch.randn(2, 5, 4, CHANNELS)
    proxy = core.proxy(x)
    expected = 0
    for k, direction in enumerate(("down", "up", "right", "left")):
        gates = core.gates(proxy).unflatten(-1, (4, 3, CHANNELS))[..., k : k + 1, :, :]
        input_gate, output_gate, skip = (
            head(proxy).unflatten(-1, (4, CHANNELS))[..., k, :] for head in (core.lam, core.out, core.skip)
        )
        h = propagate(x, gates, input_gate[..., None, :], directions=(direction,))
        expected = expected + core.merge[k] * (output_gate * h + skip * x)
    torch.testing.assert_close(core(x), expected, atol=1e-4, rtol=1e-4)
