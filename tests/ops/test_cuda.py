"""The CUDA kernels: emulated on the CPU everywhere, and on the GPU where there is one."""

import math
import os
import shutil

import pytest
import torch
from made.emulated_cuda import SHARED_MEMORY, emulated_kernels

from gspn_dit.errors import InputError
from gspn_dit.ops import propagate
from gspn_dit.ops.backend import OPERANDS, Call, FusesTail, Status
from gspn_dit.ops.build import architectures, check_toolkit
from gspn_dit.ops.cuda import NativeCuda
from gspn_dit.ops.reference import Reference
from gspn_dit.ops.registry import choose, find, register, unregister
from gspn_dit.ops.tail import EPSILON, apply_tail, tail_backward
from gspn_dit.ops.tensor_core_check import disagreement

ALL_DIRECTIONS = [0, 1, 2, 3]
LITTLE_MEMORY = 30 * 1024  # bytes of shared memory
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # ‖got - float64‖ / ‖float64‖
# On tensor cores, gradients are sums of products of two rounded numbers.
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


class EmulatedCuda(NativeCuda):
    """`native-cuda` as it is, on tensors of the CPU: its kernels are emulated."""

    name = "emulated-cuda"
    device_types = ("cpu",)
    priority = 200

    def __init__(self, shared_memory):
        super().__init__()
        self.little_memory = shared_memory < SHARED_MEMORY
        emulated_kernels().set_shared_memory(shared_memory)

    def status(self, device=None):
        return Status(True, "CUDA, emulated")


@pytest.fixture
def emulates():
    """Skips where the kernels are not emulated."""
    if torch.cuda.is_available():
        pytest.skip("the GPU itself is tested")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")


@pytest.fixture(params=["emulated", "emulated, little shared memory", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernel(request):
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        native = find("native-cuda")
        assert native.status().available, native.status().detail  # with a GPU, a missing kernel is a failure
        torch.use_deterministic_algorithms(True, warn_only=True)  # what is not written is NaN
        yield native
        torch.use_deterministic_algorithms(False)
        return
    request.getfixturevalue("emulates")
    yield EmulatedCuda(SHARED_MEMORY if request.param == "emulated" else LITTLE_MEMORY)


# For what is about tensor cores: a block of 30 KB is too small for those kernels, so there the exact ones run again.
where_tensor_cores_are_used = pytest.mark.parametrize(
    "kernel", ["emulated", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True
)


def device_of(kernel):
    return kernel.device_types[0]


def operands(b, h, w, c, k, g, *, dtype=torch.float32, device="cpu"):
    """Random x, gates, λ, u, f, s and dy, the same in every run."""
    random = torch.Generator().manual_seed(0)
    shapes = (b, h, w, c), (b, h, w, k, 3, g), (b, h, w, k, g), (b, h, w, k, g), (b, h, w, c)
    *tensors, grad = (torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype) for shape in shapes)
    decay, scale = (draw(k, c, generator=random).to(device) for draw in (torch.rand, torch.randn))
    return [*tensors, decay, scale, grad]


def distance(got, want):
    scale = want.norm()
    return ((got.double() - want).norm() / (scale if scale > 1e-9 else 1.0)).item()


def tolerance(x, window=0):
    """Of y. On tensor cores every direction rounds y where lines have 17 to 32 tokens, which bfloat16's allows for."""
    longest = max(min(size, window or size) for size in x.shape[1:3])
    if x.dtype == torch.float16 and 16 < longest <= 32:
        return 1e-3
    return TOLERANCE[x.dtype] * (10 if longest > 500 else 1)  # rounding adds up over a long history


def check(kernel, x, gates, input_gate, output_gate, decay, scale, grad, chunk, directions, window=0, shift=0):
    """Outputs and gradients against the reference in float64."""
    long = 10 if max(x.shape[1:3]) > 500 else 1  # rounding adds up over a long history
    tensors = (x, gates, input_gate, output_gate, decay, scale)
    exact = [None if t is None else t.double() for t in tensors]
    options = chunk, window, shift, directions
    want = Reference().forward(Call(*exact, *options))
    call = Call(*tensors, *options)
    assert kernel.supports(call) is None
    y = kernel.forward(call)
    assert y.dtype == x.dtype and y.stride() == torch.empty_like(x).stride()
    assert distance(y, want) < tolerance(x, window)
    wants = Reference().backward(grad.double(), Call(*exact, *options))
    gots = kernel.backward(grad, call)
    for name, got, want in zip(OPERANDS, gots, wants, strict=True):
        assert got.shape == want.shape
        if got.numel():
            assert distance(got, want) < GRADIENT_TOLERANCE[x.dtype] * long, name


SHAPES = [
    # B, H, W, C, K, G, chunk (0: global)
    (2, 16, 16, 64, 4, 1, 0),
    (1, 16, 16, 128, 4, 2, 2),
    (1, 16, 16, 72, 4, 2, 4),  # 36 channels a group: a slab is not full
    (2, 16, 16, 64, 4, 4, 0),  # 16 channels a group
    (1, 5, 7, 12, 4, 3, 3),
    (1, 7, 5, 5, 4, 5, 2),  # odd C, one channel a group
    (1, 13, 11, 15, 4, 3, 0),  # odd groups
    (2, 1, 6, 6, 4, 2, 0),
    (1, 6, 1, 6, 2, 6, 1),
    (1, 16, 16, 64, 4, 64, 2),
    (1, 20, 30, 36, 4, 2, 5),
    (1, 32, 32, 16, 4, 1, 0),
    (1, 17, 9, 40, 3, 40, 0),
    (1, 9, 17, 40, 1, 1, 4),
    (2, 33, 6, 20, 4, 2, 4),  # too long to hold on chip: in tiles, or line by line
    (1, 40, 36, 12, 4, 12, 7),
    (1, 34, 67, 24, 4, 2, 0),
    (1, 64, 33, 16, 3, 16, 4),
    (1, 34, 34, 20, 4, 1, 16),
    (1, 40, 33, 15, 4, 3, 0),
    (1, 2, 3, 1, 4, 1, 0),
    (1, 32, 8, 128, 4, 2, 4),
    (1, 1030, 2, 8, 2, 8, 0),
    # groups of 16, 32, 48 and 64 channels: in 16-bit elements, on tensor cores
    (1, 13, 11, 48, 4, 1, 3),
    (1, 5, 7, 64, 4, 2, 1),
    (1, 1, 6, 16, 4, 1, 0),
    (1, 33, 6, 16, 4, 1, 0),
    (1, 20, 30, 64, 4, 1, 5),
    (1, 40, 18, 32, 4, 2, 16),
    (1, 17, 16, 16, 1, 1, 0),
]
# Emulated, these take seconds.
LARGE_SHAPES = [
    (1, 2, 700, 64, 4, 1, 0),
    (1, 3, 1030, 20, 4, 1, 2),
    (1, 40, 36, 128, 4, 2, 0),
    (1, 2, 1024, 128, 4, 2, 0),
    (1, 513, 33, 6, 4, 2, 16),
    (1, 130, 20, 128, 4, 2, 20),
    (2, 32, 32, 128, 4, 2, 0),
    (1, 100, 140, 64, 4, 1, 0),
]


# Every shape in float32, and in bfloat16, which has kernels of its own on tensor cores. In float16 all those that run
# there; of the others all but the largest maps, since exact kernels differ between the two only in reading and writing.
SHAPES_AND_DTYPES = [
    (shape, dtype)
    for dtype in TOLERANCE
    for shape in SHAPES
    if dtype != torch.float16 or shape[3] // shape[5] in (16, 32, 48, 64) or math.prod(shape[:4]) < 20_000
]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES, ids=str)
def test_agrees_with_the_reference_in_float64(kernel, shape, dtype):
    *sizes, chunk = shape
    tensors = operands(*sizes, dtype=dtype, device=device_of(kernel))
    check(kernel, *tensors, chunk, list(range(sizes[4])))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["gpu"], indirect=True)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_long_lines_and_many_channels_agree_on_the_gpu(kernel, shape, dtype):
    *sizes, chunk = shape
    check(kernel, *operands(*sizes, dtype=dtype, device="cuda"), chunk, list(range(sizes[4])))


# Lines of 17 to 32 tokens: forward, a block has all of a map.
WIDE_SHAPES = [
    (1, 17, 32, 64, 4, 1, 0),
    (1, 20, 24, 48, 4, 2, 16),
    (2, 32, 32, 16, 4, 2, 20),
    (1, 31, 9, 32, 4, 1, 2),
    (1, 32, 30, 64, 4, 1, 1),
    (1, 19, 25, 32, 1, 2, 0),
]


@where_tensor_cores_are_used
@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_maps_on_tensor_cores(kernel, shape, dtype):
    *sizes, chunk = shape
    x, gates, input_gate, output_gate, decay, scale, grad = operands(*sizes, dtype=dtype, device=device_of(kernel))
    directions = list(range(sizes[4]))
    check(kernel, x, gates, input_gate, output_gate, decay, scale, grad, chunk, directions)
    check(kernel, x, gates, input_gate, None, decay, scale, grad, chunk, directions)
    check(kernel, x, gates, input_gate, None, None, None, grad, chunk, directions)


@where_tensor_cores_are_used
@pytest.mark.parametrize("directions", [[0], [1], [2], [3], [1, 0], [3, 2], [2, 1], [1, 2, 3]], ids=str)
def test_any_directions_of_wide_maps(kernel, directions):
    """Where there is one sense of an axis, or one axis, something else adds to the sum first."""
    *tensors, _ = operands(1, 19, 30, 32, len(directions), 1, dtype=torch.bfloat16, device=device_of(kernel))
    want = Reference().forward(Call(*(t.double() for t in tensors), directions=directions))
    assert distance(kernel.forward(Call(*tensors, directions=directions)), want) < TOLERANCE[torch.bfloat16]


# H, W, window, shift: whole windows and others, grids that begin with a part of one, axes shorter than a window.
WINDOWS = [
    (6, 5, 1, 0),
    (17, 20, 3, 2),
    (16, 24, 8, 4),
    (21, 7, 8, 0),
    (35, 18, 16, 8),
    (12, 33, 12, 5),
    (41, 23, 20, 7),
    (18, 39, 20, 13),
    (34, 66, 32, 16),
    (50, 37, 34, 13),
]


@pytest.mark.parametrize("groups", [1, 8], ids=["shared gates", "own gates"])
@pytest.mark.parametrize("shape", WINDOWS, ids=str)
def test_windows_in_exact_kernels(kernel, shape, groups):
    height, width, window, shift = shape
    tensors = operands(1, height, width, 8, 4, groups, device=device_of(kernel))
    check(kernel, *tensors, 0, [0, 1, 2, 3], window, shift)
    x, gates, input_gate, *_, grad = operands(1, height, width, 8, 1, groups, device=device_of(kernel))
    check(kernel, x, gates, input_gate, None, None, None, grad, 0, [3], window, shift)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.bfloat16) for shape in WINDOWS] + [(shape, torch.float16) for shape in WINDOWS[4::3]],
    ids=str,
)
def test_windows_on_tensor_cores(kernel, shape, dtype):
    height, width, window, shift = shape
    x, gates, input_gate, output_gate, decay, scale, grad = operands(
        1, height, width, 32, 4, 2, dtype=dtype, device=device_of(kernel)
    )
    check(kernel, x, gates, input_gate, output_gate, decay, scale, grad, 0, [0, 1, 2, 3], window, shift)
    check(kernel, x, gates, input_gate, None, decay, scale, grad, 0, [0, 1, 2, 3], window, shift)


@where_tensor_cores_are_used
@pytest.mark.parametrize("directions", [[1], [2], [3, 0, 2]], ids=str)
@pytest.mark.parametrize("shape", [(21, 18, 8, 3), (18, 39, 20, 13)], ids=str)
def test_windows_on_tensor_cores_of_any_directions(kernel, shape, directions):
    height, width, window, shift = shape
    tensors = operands(1, height, width, 64, len(directions), 1, dtype=torch.bfloat16, device=device_of(kernel))
    check(kernel, *tensors, 0, directions, window, shift)


# One map of tiles that begin with windows, where the tail's backward pass is inside, and one of tiles with edges.
@pytest.mark.parametrize("shape", [(21, 18, 8, 3), (18, 39, 20, 13)], ids=str)
def test_norm_and_direct_path_in_windows_on_tensor_cores(kernel, shape):
    """Gates as the mixers make them, x and dy as parts of wider maps."""
    height, width, window, shift = shape
    x, gates, input_gate, _, decay, scale, grad = operands(
        2, height, width, 32, 4, 2, dtype=torch.bfloat16, device=device_of(kernel)
    )
    both = torch.cat([gates.permute(0, 1, 2, 5, 3, 4).flatten(-2), input_gate.transpose(3, 4)], -1)
    logits, input_gate = both[..., :12].unflatten(-1, (4, 3)).permute(0, 1, 2, 4, 5, 3), both[..., 12:].transpose(3, 4)
    x, grad = (torch.cat([tensor, tensor], -1)[..., 32:] for tensor in (x, grad))
    direct = torch.linspace(-2, 2, 32, device=device_of(kernel))
    call = Call(x, logits, input_gate, None, decay, scale, window=window, shift=shift)
    check(kernel, *call.operands, grad, 0, ALL_DIRECTIONS, window, shift)
    check_tail(kernel, call, direct, grad)


@pytest.mark.parametrize("directions", [[1], [3], [2, 1], [3, 0, 2], [1, 0], [2, 3]], ids=str)
def test_any_directions_in_any_order(kernel, directions):
    x, gates, input_gate, output_gate, decay, scale, grad = operands(
        1, 13, 11, 24, len(directions), 2, device=device_of(kernel)
    )
    check(kernel, x, gates, input_gate, output_gate, decay, scale, grad, 3, directions)
    check(kernel, x, gates, input_gate, None, decay, None, grad, 0, directions)
    check(kernel, x, gates, input_gate, output_gate, None, scale, grad, 0, directions)
    check(kernel, x, gates, input_gate, None, None, None, grad, 3, directions)
    check(kernel, *operands(1, 36, 40, 8, len(directions), 2, device=device_of(kernel)), 0, directions)


@where_tensor_cores_are_used
@pytest.mark.parametrize("directions", [[3], [2, 1], [3, 0, 2]], ids=str)
@pytest.mark.parametrize("width", [18, 34])
def test_any_directions_in_any_order_on_tensor_cores(kernel, width, directions):
    x, gates, input_gate, output_gate, decay, scale, grad = operands(
        1, 13, width, 32, len(directions), 2, dtype=torch.bfloat16, device=device_of(kernel)
    )
    check(kernel, x, gates, input_gate, None, decay, scale, grad, 3, directions)
    check(kernel, x, gates, input_gate, output_gate, None, None, grad, 0, directions)


@where_tensor_cores_are_used
@pytest.mark.parametrize("shape", [(1, 13, 11, 64, 4, 1), (1, 34, 5, 64, 4, 2)], ids=str)
def test_gates_side_by_side_give_the_same_bits(kernel, shape):
    """As the mixers make them, a group's 16 numbers are read at once; here, they are not copied to be so."""
    x, gates, input_gate, _, decay, scale, _ = operands(*shape, dtype=torch.bfloat16, device=device_of(kernel))
    both = torch.cat([gates.permute(0, 1, 2, 5, 3, 4).flatten(-2), input_gate.transpose(3, 4)], -1)
    logits = both[..., :12].unflatten(-1, (4, 3)).permute(0, 1, 2, 4, 5, 3)
    together = kernel.forward(Call(x, logits, both[..., 12:].transpose(3, 4), None, decay, scale))
    assert torch.equal(together, kernel.forward(Call(x, gates, input_gate, None, decay, scale)))


@pytest.mark.parametrize("width", [11, 18, 34])
def test_part_of_a_wider_map_on_tensor_cores(kernel, width):
    x, gates, input_gate, output_gate, decay, scale, grad = operands(
        1, 13, width, 32, 4, 2, dtype=torch.bfloat16, device=device_of(kernel)
    )
    part_of_more = torch.cat([x, x], dim=-1)[..., 32:]
    group_by_group = gates.permute(0, 1, 2, 5, 3, 4).contiguous().permute(0, 1, 2, 4, 5, 3)
    check(kernel, part_of_more, group_by_group, input_gate, output_gate, decay, scale, grad, 4, [0, 1, 2, 3])


@pytest.mark.parametrize("shape", [(1, 16, 9), (1, 18, 20), (1, 18, 34)], ids=str)
def test_nan_shows(kernel, shape):
    x, gates, input_gate, *_ = operands(*shape, 16, 1, 1, dtype=torch.bfloat16, device=device_of(kernel))
    x[0, 3, 4, 5] = torch.nan
    y = kernel.forward(Call(x, gates, input_gate, directions=[0]))
    assert y[0, 3:, 4, 5].isnan().all()
    assert not y[..., :5].isnan().any() and not y[..., 6:].isnan().any()  # channels keep to themselves


@pytest.mark.parametrize(
    "shape", [(2, 13, 11, 32, 4, 2), (1, 18, 20, 64, 4, 1), (1, 31, 9, 48, 4, 2), (1, 18, 34, 16, 4, 1)], ids=str
)
def test_the_tail_in_bfloat16(kernel, shape):
    """y / rms + direct x: as part of a kernel on tensor cores, or in a pass after exact ones."""
    *tensors, _ = operands(*shape, dtype=torch.bfloat16, device=device_of(kernel))
    groups = shape[-1]
    direct = torch.randn(shape[3], generator=torch.Generator().manual_seed(1)).to(device_of(kernel))
    y, inverse_rms = kernel.forward_with_tail(Call(*tensors), direct)
    sums = Reference().forward(Call(*(t.double() for t in tensors))).unflatten(-1, (groups, -1))
    want = (sums.square().mean(-1) + 1e-6).rsqrt()
    assert distance(inverse_rms, want) < TOLERANCE[torch.bfloat16]
    want = (sums * want[..., None]).flatten(-2) + direct.double() * tensors[0].double()
    assert distance(y, want) < TOLERANCE[torch.bfloat16]


@where_tensor_cores_are_used
def test_kernels_that_are_right_pass_the_check_of_a_device(kernel):
    assert disagreement(kernel, torch.device(device_of(kernel))) is None
    with torch.inference_mode():
        assert disagreement(kernel, torch.device(device_of(kernel))) is None


@pytest.mark.parametrize("kernel", ["emulated"], indirect=True)
@pytest.mark.parametrize(
    ("fault", "of"), [("a sign", "the gradient of gates is 2 "), ("NaN", "the gradient of gates is nan ")]
)
def test_kernels_that_are_wrong_do_not(kernel, fault, of, monkeypatch):
    right = kernel.backward_with_tail

    def wrong(*arguments):
        grad_x, grad_gates, *others = right(*arguments)
        return grad_x, -grad_gates if fault == "a sign" else grad_gates * torch.nan, *others

    monkeypatch.setattr(kernel, "backward_with_tail", wrong)
    assert f"on 16 × 16 tokens {of}" in disagreement(kernel, torch.device("cpu"))


@pytest.mark.parametrize("kernel", ["emulated"], indirect=True)
@pytest.mark.parametrize(("environment", "fault"), [("0", None), ("1", "y is 2 of its norm away"), ("1", None)])
def test_wrong_or_unwanted_kernels_leave_calls_to_exact_ones(kernel, environment, fault, monkeypatch, recwarn):
    """The exact kernels differ in the last bits, which shows that they ran."""
    *tensors, _ = operands(1, 13, 11, 32, 4, 2, dtype=torch.bfloat16)
    call = Call(*tensors)
    before = kernel.forward(call)
    monkeypatch.setenv("GSPN_DIT_TENSOR_CORES", environment)
    monkeypatch.setattr("gspn_dit.ops.cuda.disagreement", lambda kernel, device: fault)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    try:
        kernel._check_tensor_cores(torch.device("cuda", 0))
        after = kernel.forward(call)
    finally:
        torch.ops.gspn_dit_cuda.use_tensor_cores(True)
    assert torch.equal(before, after) == (environment == "1" and fault is None)
    assert distance(after, before.double()) < 2 * TOLERANCE[torch.bfloat16]
    assert [str(w.message) for w in recwarn.list] == (
        [f"the kernels on tensor cores are not used: on cuda:0 (a GPU) {fault}; please report this"] if fault else []
    )


@pytest.mark.parametrize("groups", [2, 24])
def test_any_strides(kernel, groups):
    x, gates, input_gate, output_gate, decay, scale, grad = operands(2, 13, 11, 24, 4, groups, device=device_of(kernel))
    factors = decay.t().contiguous().t(), scale[0].expand(4, -1)
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    group_by_group = gates.permute(0, 1, 2, 5, 3, 4).contiguous().permute(0, 1, 2, 4, 5, 3)
    part_of_more = torch.cat([x, x], dim=-1)[..., 24:]
    check(kernel, channels_first, gates, input_gate, output_gate, *factors, grad, 0, [0, 1, 2, 3])
    check(
        kernel,
        x,
        group_by_group,
        input_gate.transpose(3, 4).contiguous().transpose(3, 4),
        output_gate,
        *factors,
        grad,
        0,
        [0, 1, 2, 3],
    )
    check(kernel, part_of_more, gates, input_gate, output_gate, *factors, grad.expand_as(grad), 4, [0, 1, 2, 3])
    check(
        kernel,
        x,
        gates,
        input_gate,
        output_gate,
        *factors,
        torch.ones((), device=device_of(kernel)).expand_as(grad),
        4,
        [0, 1, 2, 3],
    )


@pytest.mark.parametrize("direction", range(4))
@pytest.mark.parametrize("chunk", [0, 1, 3])
@pytest.mark.parametrize(
    ("h", "w", "dtype"), [(7, 5, torch.float32), *((*size, torch.bfloat16) for size in [(7, 5), (18, 20), (18, 34)])]
)
def test_ones_count_the_lines_of_the_chunk(kernel, direction, chunk, h, w, dtype):
    gates = torch.randn(1, h, w, 1, 3, 2, device=device_of(kernel), dtype=dtype)
    ones = torch.ones(1, h, w, 4 if dtype == torch.float32 else 32, device=device_of(kernel), dtype=dtype)
    input_gate = torch.ones(1, h, w, 1, 2, device=device_of(kernel), dtype=dtype)
    y = kernel.forward(Call(ones, gates, input_gate, chunk=chunk, directions=[direction]))
    lines = h if direction < 2 else w
    n = chunk or lines
    for line in range(lines):
        first, last = line // n * n, min(line // n * n + n, lines) - 1
        expected = line - first + 1 if direction % 2 == 0 else last - line + 1
        torch.testing.assert_close(
            *torch.broadcast_tensors(
                y.select(1 if direction < 2 else 2, line),
                torch.tensor(float(expected), device=device_of(kernel), dtype=dtype),
            ),
            **({} if dtype == torch.float32 else {"rtol": 0, "atol": 0}),  # to the last bit
        )


def test_logits_of_any_size_stay_finite(kernel):
    x, _, *others = operands(1, 6, 5, 8, 4, 2, device=device_of(kernel))
    sizes = torch.tensor([-1e4, -80.0, 0.0, 80.0, 1e4], device=device_of(kernel))
    random = torch.Generator().manual_seed(0)
    gates = sizes[torch.randint(5, (1, 6, 5, 4, 3, 2), generator=random).to(device_of(kernel))]
    check(kernel, x, gates, *others, 0, [0, 1, 2, 3])


def test_a_line_too_long_for_shared_memory_runs_elsewhere(emulates):
    """30 KB have room for a line of 1400 tokens in the forward pass, not in the backward pass, and none for 4000."""
    long, longer = (Call(*operands(1, 2, width, 2, 1, 2)[:-1], directions=[0]) for width in (1400, 4000))
    assert EmulatedCuda(SHARED_MEMORY).supports(long, backward=True) is None
    kernel = EmulatedCuda(LITTLE_MEMORY)
    register(kernel)
    try:
        assert choose(long) is kernel
        assert choose(long, backward=True) is not kernel
        assert choose(longer) is not kernel
        with pytest.raises(InputError, match=r"^backend='emulated-cuda': cannot run this call: .*line"):
            choose(longer, "emulated-cuda")
        x, *others = (tensor for tensor in long[:6])
        results = []
        for backend in (None, "reference"):
            leaf = x.clone().requires_grad_()
            y = propagate(leaf, *others[:3], decay=others[3], scale=others[4], directions=["down"], backend=backend)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    finally:
        unregister("emulated-cuda")


WITH_TAIL = [
    # B, H, W, C, K, G, chunk
    (1, 16, 16, 64, 4, 1, 0),
    (1, 9, 6, 80, 4, 2, 4),  # 40 channels a group: ten lanes of sixteen have some
    (2, 5, 7, 45, 4, 3, 3),  # odd channels
    (1, 5, 4, 12, 2, 6, 0),  # a group is one lane's
    (1, 3, 2, 520, 2, 1, 0),  # a group is wider than a warp's access
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", WITH_TAIL, ids=str)
def test_norm_and_direct_path_agree_with_the_plain_ones(kernel, shape, dtype):
    *sizes, chunk = shape
    *tensors, grad = operands(*sizes, dtype=dtype, device=device_of(kernel))
    direct = torch.linspace(-2, 2, sizes[3], device=device_of(kernel))
    check_tail(kernel, Call(*tensors, chunk=chunk, directions=range(sizes[4])), direct, grad)


def test_norm_and_direct_path_take_any_strides(kernel):
    x, *tensors, grad = operands(1, 6, 5, 16, 4, 2, dtype=torch.bfloat16, device=device_of(kernel))
    direct = torch.rand(32, device=device_of(kernel))
    for view in (x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), torch.cat([x[..., :1], x], -1)[..., 1:]):
        check_tail(kernel, Call(view, *tensors), direct[::2], grad)
        check_tail(kernel, Call(view, *tensors), direct[1:17], grad.mean().expand_as(grad))


# On tensor cores: one tile, where the tail's backward pass is inside the scans', and several.
TAIL_ON_TENSOR_CORES = [
    # B, H, W, C, K, G, chunk
    (2, 16, 16, 64, 4, 1, 0),
    (1, 13, 11, 96, 4, 2, 5),
    (1, 5, 7, 64, 4, 2, 1),
    (2, 6, 1, 32, 4, 2, 0),
    (1, 18, 20, 48, 4, 1, 16),
    (1, 34, 6, 32, 4, 2, 0),
]


@where_tensor_cores_are_used
@pytest.mark.parametrize("shape", TAIL_ON_TENSOR_CORES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norm_and_direct_path_on_tensor_cores(kernel, shape, dtype):
    *sizes, chunk = shape
    x, gates, input_gate, output_gate, decay, scale, grad = operands(*sizes, dtype=dtype, device=device_of(kernel))
    direct = torch.linspace(-2, 2, sizes[3], device=device_of(kernel))
    check_tail(kernel, Call(x, gates, input_gate, output_gate, decay, scale, chunk), direct, grad)
    check_tail(kernel, Call(x, gates, input_gate, None, None, scale, chunk), direct, grad)


@where_tensor_cores_are_used
@pytest.mark.parametrize("directions", [[2, 3], [1, 3], [3, 0, 2]], ids=str)
@pytest.mark.parametrize("shape", [(1, 12, 15), (1, 18, 5)], ids=str)
def test_norm_and_direct_path_on_tensor_cores_of_any_directions(kernel, shape, directions):
    *tensors, grad = operands(*shape, 64, len(directions), 2, dtype=torch.bfloat16, device=device_of(kernel))
    direct = torch.linspace(2, -1, 64, device=device_of(kernel))
    check_tail(kernel, Call(*tensors, directions=directions), direct, grad)


@pytest.mark.parametrize("kilobytes", [163, 99])  # of an A100's blocks, and of consumer cards'
def test_norm_and_direct_path_on_devices_with_less_shared_memory(emulates, kilobytes):
    kernel = EmulatedCuda(kilobytes * 1024)
    for height, channels in ((13, 64), (13, 32), (18, 64)):
        *tensors, grad = operands(1, height, 11, channels, 4, 1, dtype=torch.bfloat16)
        direct = torch.linspace(-1, 2, channels)
        check_tail(kernel, Call(*tensors, chunk=5), direct, grad)


@pytest.mark.parametrize("shape", [(1, 16, 9), (1, 18, 20)], ids=str)
def test_nan_in_the_gradient_of_the_result_shows(kernel, shape):
    """In all channels of the group, since the norm is of them all, and in no other group."""
    *tensors, grad = operands(*shape, 64, 1, 2, dtype=torch.bfloat16, device=device_of(kernel))
    direct, call = torch.ones(64, device=device_of(kernel)), Call(*tensors, directions=[0])
    y, inverse_rms = kernel.forward_with_tail(call, direct)
    grad[0, 3, 4, 5] = torch.nan
    dx, *_, grad_decay, grad_scale, grad_direct = kernel.backward_with_tail(grad, y, inverse_rms, call, direct)
    assert dx[0, :4, 4, :32].isnan().all() and grad_decay[0, :32].isnan().all() and grad_scale[0, :32].isnan().all()
    for of_channels in dx, grad_decay, grad_scale:
        assert not of_channels[..., 32:].isnan().any()
    assert grad_direct.isnan().nonzero().tolist() == [[5]]


def check_tail(kernel, call, direct, grad):
    """y, 1 / rms and gradients against the plain tail in float64, around scans that are tested alone."""
    tolerance = TOLERANCE[call.x.dtype]
    assert isinstance(kernel, FusesTail) and kernel.supports_tail(call) and kernel.supports_tail(call, backward=True)
    y, inverse_rms = kernel.forward_with_tail(call, direct)
    assert y.dtype == call.x.dtype and y.stride() == torch.empty_like(call.x).stride()
    scanned, exact = kernel.forward(call).double(), [None if t is None else t.double() for t in call.operands]
    want, want_rms = apply_tail(scanned, exact[0], direct.double(), call.input_gate.shape[-1])
    assert distance(y, want) < tolerance
    assert inverse_rms.dtype == torch.float32 and inverse_rms.is_contiguous()
    assert distance(inverse_rms, want_rms) < tolerance

    gots, again = (kernel.backward_with_tail(grad, y, inverse_rms, call, direct) for _ in range(2))
    saved = [t.double() for t in (grad, y, inverse_rms)]
    grad_scanned, grad_direct = tail_backward(*saved, exact[0], direct.double())
    grad_scanned = grad_scanned.to(call.x.dtype).double()  # as the scans' backward pass reads it
    wants = [*Reference().backward(grad_scanned, Call(*exact, *call.options)), grad_direct]
    wants[0] = wants[0] + direct.double() * saved[0]
    for name, got, other, wanted in zip((*OPERANDS, "direct"), gots, again, wants, strict=True):
        assert torch.equal(got, other), name
        assert distance(got, wanted) < 2 * tolerance, name
    assert gots[0].dtype == call.x.dtype and gots[0].stride() == torch.empty_like(call.x).stride()
    assert gots[-1].dtype == torch.float32 and gots[-1].shape == direct.shape


@pytest.mark.parametrize("kernel", ["emulated"], indirect=True)
def test_a_group_of_zeros_has_the_inverse_root_of_epsilon(kernel):
    x, *tensors, _ = operands(1, 3, 4, 8, 4, 2)
    y, inverse_rms = kernel.forward_with_tail(Call(torch.zeros_like(x), *tensors), torch.ones(8))
    assert not y.any()
    torch.testing.assert_close(inverse_rms, torch.full((1, 3, 4, 2), EPSILON**-0.5))


@pytest.mark.parametrize("shape", [(2, 16, 16, 64, 4, 1), (1, 40, 36, 24, 4, 2)], ids=str)
def test_gradients_are_the_same_bits_twice(kernel, shape):
    *tensors, grad = operands(*shape, device=device_of(kernel))
    first, second = (kernel.backward(grad, Call(*tensors)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@where_tensor_cores_are_used
@pytest.mark.parametrize("shape", [(2, 16, 16, 64, 4, 1), (1, 20, 18, 32, 4, 2)], ids=str)
def test_results_on_tensor_cores_are_the_same_bits_twice(kernel, shape):
    *tensors, _ = operands(*shape, dtype=torch.float16, device=device_of(kernel))
    first, second = (kernel.forward(Call(*tensors)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kernel", ["emulated, little shared memory"], indirect=True)
def test_what_does_not_fit_is_refused_before_it_runs(kernel):
    """On a block of 30 KB, forward has room for lines of 3840 tokens, backward for 1280."""
    too_long = "a line is too long for the shared memory of this device"
    for width, forward, backward in (
        (1280, "", ""),
        (1281, "", too_long),
        (3840, "", too_long),
        (3841, too_long, too_long),
    ):
        *tensors, grad = operands(1, 2, width, 1, 1, 1)
        call = Call(*tensors, directions=[0])
        assert kernel.supports(call) == (forward or None)
        assert kernel.supports(call, backward=True) == (backward or None)
        passes = (forward, kernel.forward, (call,)), (backward, kernel.backward, (grad, call))
        for reason, run, arguments in passes:
            if reason:
                with pytest.raises(RuntimeError, match=reason):
                    run(*arguments)
            else:
                run(*arguments)


@pytest.mark.parametrize("kernel", ["emulated"], indirect=True)
def test_a_dtype_without_a_kernel_is_refused(kernel):
    *tensors, _ = operands(1, 2, 3, 4, 1, 2, dtype=torch.float64)
    said = "x has dtype Double: wanted float32, bfloat16 or float16 on CUDA"
    call = Call(*tensors, directions=[0])
    assert kernel.supports(call) == said
    with pytest.raises(RuntimeError, match=said):
        kernel.forward(call)


# Groups of 16, 32, 48 and 64 channels, on tensor cores in 16-bit elements: maps in one tile and in several.
TENSOR_SHAPES = [
    (1, 16, 16, 64, 4, 1, 0),
    (1, 13, 11, 96, 4, 2, 5),
    (1, 5, 7, 32, 4, 2, 1),
    (1, 1, 6, 32, 4, 1, 0),
    (1, 33, 6, 64, 4, 1, 0),
    (1, 20, 18, 48, 4, 1, 20),
    (1, 18, 40, 64, 4, 2, 16),
    (1, 34, 17, 16, 4, 1, 2),
]


@where_tensor_cores_are_used
@pytest.mark.parametrize("shape", TENSOR_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_on_tensor_cores(kernel, shape, dtype):
    *sizes, chunk = shape
    x, gates, input_gate, output_gate, decay, scale, grad = operands(*sizes, dtype=dtype, device=device_of(kernel))
    check(kernel, x, gates, input_gate, output_gate, decay, scale, grad, chunk, ALL_DIRECTIONS)
    check(kernel, x, gates, input_gate, None, decay, scale, grad, chunk, ALL_DIRECTIONS)


@where_tensor_cores_are_used
@pytest.mark.parametrize("shape", [(1, 13, 11), (1, 18, 20)], ids=str)
def test_gradients_on_tensor_cores_without_f_or_s(kernel, shape):
    x, gates, input_gate, output_gate, decay, scale, grad = operands(
        *shape, 32, 4, 1, dtype=torch.bfloat16, device=device_of(kernel)
    )
    check(kernel, x, gates, input_gate, None, None, None, grad, 4, ALL_DIRECTIONS)
    check(kernel, x, gates, input_gate, output_gate, decay, None, grad, 0, ALL_DIRECTIONS)
    check(kernel, x, gates, input_gate, None, torch.zeros_like(decay), scale, grad, 0, ALL_DIRECTIONS)
    check(kernel, x, gates, input_gate, None, decay, torch.zeros_like(scale), grad, 0, ALL_DIRECTIONS)


@where_tensor_cores_are_used
@pytest.mark.parametrize("directions", [[1], [2], [2, 1], [3, 0, 2], [1, 0], [2, 3]], ids=str)
@pytest.mark.parametrize("shape", [(1, 13, 11), (1, 18, 21)], ids=str)
def test_gradients_on_tensor_cores_of_any_directions(kernel, shape, directions):
    tensors = operands(*shape, 32, len(directions), 2, dtype=torch.bfloat16, device=device_of(kernel))
    check(kernel, *tensors, 3, directions)


@where_tensor_cores_are_used
@pytest.mark.parametrize("shape", [(1, 13, 11, 64, 4, 2), (1, 18, 5, 64, 4, 1)], ids=str)
def test_gradients_of_gates_side_by_side(kernel, shape):
    """As the mixers make them: a group's 12 logits and 4 input gates lie in 32 bytes."""
    x, gates, input_gate, _, decay, scale, grad = operands(*shape, dtype=torch.bfloat16, device=device_of(kernel))
    both = torch.cat([gates.permute(0, 1, 2, 5, 3, 4).flatten(-2), input_gate.transpose(3, 4)], -1)
    logits = both[..., :12].unflatten(-1, (4, 3)).permute(0, 1, 2, 4, 5, 3)
    side_by_side = Call(x, logits, both[..., 12:].transpose(3, 4), None, decay, scale, chunk=4)
    apart = Call(x, gates, input_gate, None, decay, scale, chunk=4)
    for got, want in zip(kernel.backward(grad, side_by_side), kernel.backward(grad, apart), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kilobytes", [163, 99])  # of an A100's blocks, and of consumer cards'
@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("shape", [(1, 13, 11), (1, 18, 17)], ids=str)
def test_gradients_on_devices_with_less_shared_memory(emulates, shape, channels, kilobytes):
    """One sense of an axis at a time where two do not fit; exact kernels where one does not, 64 channels on 99 KB."""
    kernel = EmulatedCuda(kilobytes * 1024)
    for directions in ALL_DIRECTIONS, [3, 0]:
        tensors = operands(*shape, channels, len(directions), 1, dtype=torch.bfloat16)
        check(kernel, *tensors, 5, directions)
    *tensors, grad = operands(*shape, channels, 4, 1, dtype=torch.bfloat16)
    decay_gradient = kernel.backward(grad, Call(*tensors, chunk=5))[4]
    exact = [t.double() for t in tensors]
    wanted = Reference().backward(grad.double(), Call(*exact, chunk=5))[4]
    summed_in_float32 = distance(decay_gradient, wanted) < 1e-5
    assert summed_in_float32 == (channels == 64 and kilobytes == 99)


@where_tensor_cores_are_used
@pytest.mark.parametrize("shape", [(2, 16, 16, 64, 4, 1), (1, 20, 18, 32, 4, 2)], ids=str)
def test_gradients_on_tensor_cores_are_the_same_bits_twice(kernel, shape):
    *tensors, grad = operands(*shape, dtype=torch.bfloat16, device=device_of(kernel))
    first, second = (kernel.backward(grad, Call(*tensors)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(1, 16, 9), (1, 18, 20)], ids=str)
def test_nan_in_a_gradient_shows(kernel, shape):
    *tensors, grad = operands(*shape, 32, 1, 1, dtype=torch.bfloat16, device=device_of(kernel))
    grad[0, 3, 4, 5] = torch.nan
    dx, *_, grad_decay, grad_scale = kernel.backward(grad, Call(*tensors, directions=[0]))
    assert dx[0, :4, 4, 5].isnan().all()
    assert not dx[..., :5].isnan().any() and not dx[..., 6:].isnan().any()  # channels keep to themselves
    for of_channels in grad_decay, grad_scale:
        assert of_channels.isnan().nonzero().tolist() == [[0, 5]]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 16, 16, 128, 4, 2), (1, 40, 36, 24, 4, 2)], ids=str)
def test_a_cuda_graph_replays_it(shape):
    tensors = [t.requires_grad_() for t in operands(*shape, device="cuda")[:-1]]
    grad = torch.randn(shape[:4], device="cuda")

    def step():
        y = propagate(*tensors[:4], decay=tensors[4], scale=tensors[5], backend="native-cuda")
        return y, *torch.autograd.grad(y, tensors, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_()  # fresh inputs in the same memory
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_compiles_without_graph_breaks_on_the_gpu():
    tensors = [t.requires_grad_() for t in operands(2, 16, 16, 64, 4, 2, device="cuda")[:-1]]

    def loss(*a):
        return propagate(*a[:4], decay=a[4], scale=a[5], chunk=4).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    want = torch.autograd.grad(loss(*tensors), tensors)
    for got, expected in zip(torch.autograd.grad(compiled(*tensors), tensors), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.gpu
def test_a_line_too_long_for_the_gpu_runs_on_the_reference_and_one_warning_says_why():
    *tensors, _ = operands(1, 2, 60_000, 2, 1, 2, device="cuda")
    with pytest.warns(UserWarning, match="reference operator.*native-cuda: .*line") as said:
        results = [propagate(*tensors[:3], directions=["down"]) for _ in range(2)]
    assert len(said) == 1
    assert torch.equal(results[0], propagate(*tensors[:3], directions=["down"], backend="reference"))


@pytest.mark.gpu
@pytest.mark.slow
def test_a_tensor_of_more_than_two_to_the_31_elements():
    x = torch.randn(1, 2048, 2048, 576, dtype=torch.bfloat16, device="cuda")  # 2.4e9 elements
    gates = torch.randn(1, 2048, 2048, 1, 3, 1, dtype=torch.bfloat16, device="cuda")
    input_gate = torch.rand(1, 2048, 2048, 1, 1, dtype=torch.bfloat16, device="cuda")
    y = propagate(x, gates, input_gate, chunk=2, directions=["up"])
    for corner in (slice(0, 4), slice(-4, None)):
        want = propagate(
            x[:, corner], gates[:, corner], input_gate[:, corner], chunk=2, directions=["up"], backend="reference"
        )
        torch.testing.assert_close(y[:, corner], want, rtol=1e-2, atol=1e-2)


def test_architectures_older_than_the_kernel_are_left_out(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5;8.0 9.0+PTX Volta Hopper")
    assert architectures() == ["8.0", "9.0+PTX", "Hopper"]


@pytest.mark.parametrize(
    ("installed", "said"),
    [(None, "there is no nvcc"), ("12.4", r"CUDA 13\.0, and .*nvcc is of CUDA 12\.4"), ("13.1", None)],
)
def test_a_missing_or_another_toolkit_is_named_with_the_remedy(tmp_path, monkeypatch, installed, said):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if installed is not None:
        (tmp_path / "bin").mkdir()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {installed}, V{installed}.1'\n")
        nvcc.chmod(0o755)
    if said is None:
        check_toolkit()
    else:
        with pytest.raises(RuntimeError, match=f"{said}.*CUDA_HOME"):
            check_toolkit()
