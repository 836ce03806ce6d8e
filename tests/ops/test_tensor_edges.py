"""What tiles of a map need from each other (csrc/cuda/tensor_edges.h): emulated on the CPU, and on the GPU."""

import ctypes

import pytest
import torch
from made.emulated_cuda import SHARED_MEMORY, built_driver

TILE = 16
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}  # ‖got - float64‖ / ‖float64‖: in tf32, stored in the dtype


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def driver(request, tmp_path_factory):
    """(library, device) of the kernels by themselves."""
    library = built_driver("tensor_edges", request.param == "gpu", tmp_path_factory.mktemp("driver"))
    return library, "cuda" if request.param == "gpu" else "cpu"


def along_lines(tensor, direction):
    """(B, H, W, …) as (B, lines, positions, …), lines in the order in which the direction reads them."""
    tensor = tensor if direction < 2 else tensor.transpose(1, 2)
    return tensor.flip(1) if direction % 2 else tensor


def spans(tokens, size, first):
    """The number of the chunk or window that every token of an axis is in: one spans at most `size` tokens."""
    cut = 0 < size < tokens
    return [(i - first) // size if cut else 0 for i in range(tokens)]


def neighbours(logits, window, shift):
    """Weights (B, lines, positions, 3, G) of logits."""
    weights = torch.sigmoid(logits)
    windows = torch.tensor(spans(logits.shape[2], window, shift))
    differs = windows[1:] != windows[:-1]
    weights[:, :, 0, 0] = weights[:, :, -1, 2] = 0
    weights[:, :, 1:, 0][:, :, differs] = 0
    weights[:, :, :-1, 2][:, :, differs] = 0
    return weights / weights.sum(3, keepdim=True)


def shifted(h, by):
    """h at position - by: zeros from beyond the line."""
    h = torch.roll(h, by, 1)
    if by:
        h[:, 0 if by > 0 else -1] = 0
    return h


def tiles(n):
    return -(-n // TILE)


def expected(backward, direction, k, operands, chunk, window, shift):
    """line, side of a direction, and where tiles read them, in float64: as TileEdges describes them."""
    map_, gates, gate, decay, scale = operands
    b, c = map_.shape[0], map_.shape[3]
    read = along_lines(map_.double(), direction)
    lines, positions = read.shape[1:3]
    per_channel = c // gates.shape[5]
    of_groups = neighbours(along_lines(gates[:, :, :, k].double(), direction), window, shift)
    weights = of_groups.repeat_interleave(per_channel, 4)
    w = [weights[:, :, :, n] for n in range(3)]
    read = read * along_lines(gate[:, :, :, k].double(), direction).repeat_interleave(per_channel, 3)
    f = decay[k].double()
    line = torch.full((b, tiles(lines), positions, c), torch.nan, dtype=torch.double)
    side = torch.full((b, lines, 2 * tiles(positions), c), torch.nan, dtype=torch.double)
    firsts, lasts = list(range(0, positions, TILE)), list(range(TILE - 1, positions, TILE))
    reverse = direction % 2 == 1
    in_map = [lines - 1 - n if reverse else n for n in range(lines)]
    last_of_tile = [n + 1 == lines or in_map[n + 1] // TILE != in_map[n] // TILE for n in range(lines)]
    chunks = spans(lines, window or chunk, shift)
    starts = [n == 0 or chunks[in_map[n]] != chunks[in_map[n - 1]] for n in range(lines)]
    state = torch.zeros(b, positions, c, dtype=torch.double)
    for n in reversed(range(lines)) if backward else range(lines):
        m, restarts = in_map[n], starts[n]
        if not backward:
            carried = sum(w[i][:, n] * shifted(state, 1 - i) for i in range(3))
            state = read[:, n] + (0 if restarts else f * carried)
            if last_of_tile[n] and n + 1 < lines:
                line[:, m // TILE] = state
            side[:, m, 0::2] = state[:, firsts]
            side[:, m, 1::2][:, : len(lasts)] = state[:, lasts]
        else:
            if last_of_tile[n]:
                line[:, m // TILE] = state
            dh = scale[k].double() * read[:, n] + f * state
            into = [0 if restarts else shifted(w[2 - i][:, n] * dh, 1 - i) for i in range(3)]
            state = into[0] + into[1] + into[2] if not restarts else torch.zeros_like(dh)
            # from the position before, by its w+; from the one behind, by its w-
            side[:, m] = 0
            if not restarts:
                side[:, m, 0::2] = into[0][:, firsts]
                side[:, m, 1::2][:, : len(lasts)] = into[2][:, lasts]
    return line, side


SHAPES = [
    # B, H, W, C, G, (chunk, window, shift), directions
    (1, 33, 6, 32, 2, (4, 0, 0), [0, 1, 2, 3]),
    (2, 40, 36, 64, 1, (16, 0, 0), [0, 1, 2, 3]),
    (1, 20, 130, 48, 1, (0, 0, 0), [3, 0]),
    (1, 40, 40, 32, 1, (5, 0, 0), [2, 1, 0]),
    (1, 18, 300, 16, 1, (20, 0, 0), [1]),
    (1, 45, 41, 32, 1, (0, 20, 7), [0, 1, 2, 3]),
    (1, 18, 140, 16, 1, (0, 32, 16), [1, 2]),
    (1, 90, 20, 32, 1, (0, 17, 0), [3, 0]),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edges_of_tiles_agree_with_scans_in_float64(driver, shape, backward, dtype):
    library, device = driver
    b, h, w, c, g, cut, directions = shape
    k = len(directions)
    random = torch.Generator().manual_seed(0)
    shapes = (b, h, w, c), (b, h, w, k, 3, g), (b, h, w, k, g)
    map_, gates, gate = (torch.randn(s, generator=random).to(dtype) for s in shapes)
    decay, scale = torch.rand(k, c, generator=random), torch.randn(k, c, generator=random)
    sizes = (ctypes.c_int64 * 9)(b, h, w, c, k, g, *cut)
    kinds, begins = (ctypes.c_int * k)(*directions), (ctypes.c_int64 * (2 * k))()
    library.tile_edge_layout.restype = ctypes.c_int64
    edges = torch.full((library.tile_edge_layout(sizes, kinds, begins),), torch.nan, dtype=dtype, device=device)
    on_device = [tensor.to(device) for tensor in (map_, gates, gate, decay, scale)]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*on_device, edges)]
    memory = ctypes.c_int64(SHARED_MEMORY)
    assert library.run_tensor_edges(backward, dtype == torch.bfloat16, sizes, kinds, *pointers, memory) == 0
    edges = edges.cpu()
    for i, direction in enumerate(directions):
        wants = expected(backward, direction, i, (map_, gates, gate, decay, scale), *cut)
        for name, want, begin in zip(("line", "side"), wants, begins[2 * i : 2 * i + 2], strict=True):
            got = edges[begin : begin + want.numel()].reshape(want.shape).double()
            needed = ~want.isnan()  # elsewhere no tile reads
            assert needed.any() or (name == "line" and not backward)  # a map of one tile's lines needs none
            error = (got - want)[needed].norm() / want[needed].norm().clamp(min=1)
            assert error < TOLERANCE[dtype], (name, direction)
