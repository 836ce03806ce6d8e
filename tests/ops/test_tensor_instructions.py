"""Instructions of a warp, csrc/cuda/tensor_core.h: emulated on the CPU, and on the GPU where there is one.

What a lane holds of a matrix is written here from the PTX ISA's formulas ("matrix fragments"), for lane l = 4 g + t.
"""

import ctypes
import subprocess
import sys

import pytest
import torch
from made.emulated_cuda import built_driver

LANES = range(32)


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, tmp_path_factory):
    """(run, device): run(name, *operands) calls run_NAME of the driver."""
    library = built_driver("tensor_instructions", request.param == "gpu", tmp_path_factory.mktemp("driver"))

    def run(name, *operands):
        arguments = [ctypes.c_void_p(o.data_ptr()) if isinstance(o, torch.Tensor) else o for o in operands]
        assert getattr(library, f"run_{name}")(*arguments) == 0
        if request.param == "gpu":
            torch.cuda.synchronize()

    run.path = library._name
    return run, "cuda" if request.param == "gpu" else "cpu"


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def words(elements):
    """Pairs of 16-bit elements (..., 2) as (...) words, the first in the low half."""
    bits = elements.contiguous().view(torch.int16).int() & 0xFFFF
    return bits[..., 0] | bits[..., 1] << 16


def elements(words_, dtype):
    return torch.stack([words_ & 0xFFFF, words_ >> 16 & 0xFFFF], -1).short().view(dtype)


def sums_of(matrix):
    """(16, 8) as the lanes hold it, (32, 4)."""
    return torch.stack(
        [
            torch.stack([matrix[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] for i in range(4)])
            for lane in LANES
        ]
    )  # fmt: skip


def tf32(values):
    """With all but the 11 significant bits of float32 values cut off."""
    return (values.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_rounds_to_the_nearest_tf32(device, random):
    run, where = device
    one = 0x3F800000  # the bits of 1
    bits = [one, one + 0x0FFF, one + 0x1000, one + 0x1001, one + 0x3000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF]
    bits += [0x80000000, 1]
    wants = [one, one, one + 0x2000, one + 0x2000, one + 0x4000, 0x7F800000, 0x7F800000, None, None, -0x80000000, 0]
    values = torch.randn(32, generator=random)
    values[: len(bits)] = torch.tensor(bits).int().view(torch.float32)
    got = torch.empty(32, device=where)
    run("to_tf32", values.to(where), got)
    got = got.cpu()
    for value, want in zip(got, wants, strict=False):
        assert torch.isnan(value) if want is None else value.view(torch.int32) == want
    rest = slice(len(bits), None)
    assert torch.equal(got[rest], tf32(got[rest]))
    assert ((got[rest] - values[rest]).abs() <= values[rest].abs() * 2**-11).all()


@pytest.mark.parametrize("k", [4, 8])
def test_a_product_in_tf32(device, random, k):
    """Its operands' low bits are cut off."""
    run, where = device
    a, b, c = (torch.randn(shape, generator=random) for shape in ((16, k), (k, 8), (16, 8)))
    of_a, of_b = [], []
    for lane in LANES:
        g, t = lane // 4, lane % 4
        of_a.append(torch.stack([a[g + 8 * (i % 2), t + i // 2 * 4] for i in range(k // 2)]))
        of_b.append(torch.stack([b[t + 4 * i, g] for i in range(k // 4)]))
    of_c = sums_of(c).to(where)
    run("mma_tf32" if k == 8 else "mma_tf32_k4", *(torch.stack(o).to(where) for o in (of_a, of_b)), of_c)
    want = (c.double() + tf32(a).double() @ tf32(b).double()).float()
    torch.testing.assert_close(of_c.cpu(), sums_of(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [8, 16])
def test_a_product_in_16_bits(device, random, k, dtype):
    run, where = device
    a, b = (torch.randn(shape, generator=random).to(dtype) for shape in ((16, k), (k, 8)))
    c = torch.randn(16, 8, generator=random)
    of_a, of_b = [], []
    for lane in LANES:
        g, t = lane // 4, lane % 4
        of_a.append(
            torch.stack([a[g + 8 * (i % 2)][[2 * t + i // 2 * 8, 2 * t + i // 2 * 8 + 1]] for i in range(k // 4)])
        )
        of_b.append(torch.stack([b[[2 * t + 8 * i, 2 * t + 8 * i + 1], g] for i in range(k // 8)]))
    of_c = sums_of(c).to(where)
    run(f"mma_k{k}", dtype == torch.bfloat16, *(words(torch.stack(o)).to(where) for o in (of_a, of_b)), of_c)
    want = (c.double() + a.double() @ b.double()).float()
    torch.testing.assert_close(of_c.cpu(), sums_of(want), rtol=1e-5, atol=1e-5)


def test_a_matrix_is_transposed(device):
    run, where = device
    matrix = torch.arange(64, dtype=torch.int16).reshape(8, 8)
    lanes = words(matrix.reshape(32, 2)).to(where)  # row g, columns 2 t and 2 t + 1: in memory's order
    got = torch.empty_like(lanes)
    run("transpose_matrix", lanes, got)
    assert torch.equal(elements(got.cpu(), torch.int16).reshape(8, 8), matrix.t())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_read_from_the_rows_that_lanes_name(device, random, count, transposed):
    run, where = device
    memory = torch.arange(32 * 8, dtype=torch.int16).reshape(32, 8)
    rows = torch.randperm(32, generator=random)
    got = torch.empty(32, count, dtype=torch.int32, device=where)
    run("load_matrices", transposed, count, memory.to(where), rows.int().to(where), got)
    for i in range(count):
        matrix = memory[rows[8 * i : 8 * i + 8]]
        want = (matrix.t() if transposed else matrix).reshape(32, 2)
        assert torch.equal(elements(got[:, i].cpu(), torch.int16), want)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_written_to_the_rows_that_lanes_name(device, random, transposed):
    run, where = device
    matrices = torch.arange(4 * 64, dtype=torch.int16).reshape(4, 8, 8)
    rows = torch.randperm(32, generator=random)
    lanes = torch.stack([words(matrix.reshape(32, 2)) for matrix in matrices], dim=1)
    got = torch.empty(32, 8, dtype=torch.int16, device=where)
    run("store_matrices", transposed, lanes.to(where), rows.int().to(where), got)
    want = matrices.transpose(1, 2) if transposed else matrices
    assert torch.equal(got.cpu()[rows], want.reshape(32, 8))


def test_copies_are_there_once_their_group_has_been_waited_for(device, random):
    run, where = device
    source = torch.arange(32 * 4, dtype=torch.int32).reshape(32, 4) + 1
    copies = torch.randint(2, (32,), generator=random, dtype=torch.int32)
    got = torch.empty(2, 32, 4, dtype=torch.int32, device=where)
    run("copies", source.to(where), copies.to(where), got)
    assert torch.equal(got.cpu(), torch.stack([source * copies[:, None], source * (1 - copies[:, None])]))


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_a_copy_that_nobody_waits_for_shows(device):
    run, _ = device
    got = torch.zeros(32, 4, dtype=torch.int32)
    run("read_before_waiting", torch.ones_like(got), torch.ones(32, dtype=torch.int32), got)
    assert got.view(torch.float32).isnan().all()


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_lanes_that_meet_different_instructions_abort(device):
    run, _ = device
    script = "import ctypes, sys; b = (ctypes.c_uint32 * 32)(); ctypes.CDLL(sys.argv[1]).run_disagree(b, b)"
    ended = subprocess.run([sys.executable, "-c", script, str(run.path)], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "lanes of a warp meet at" in ended.stderr
