"""What must hold for `propagate` on every backend (the numbered properties of its definition)."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from gspn_dit.errors import InputError
from gspn_dit.ops import propagate
from gspn_dit.ops.backend import Call
from gspn_dit.ops.reference import line_weights, propagate_reference
from gspn_dit.ops.registry import find

DIRECTIONS = ("down", "up", "right", "left")
ON_CPU = ("reference", "native-cpu")  # tests/ops/test_cuda.py has the rest
AVAILABLE = [name for name in ON_CPU if find(name).status().available]


@pytest.fixture(params=ON_CPU)
def backend(request):
    state = find(request.param).status()
    if not state.available:
        pytest.skip(f"{request.param}: {state.detail}")
    return request.param


def operands(b, h, w, c, k, g, *, dtype=torch.float64, seed=0, requires_grad=False):
    """Random x, gates, λ, u, f, s."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, w, c), (b, h, w, k, 3, g), (b, h, w, k, g), (b, h, w, k, g), (k, c), (k, c)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[4] = tensors[4].sigmoid()
    dtypes = [dtype] * 4 + [torch.promote_types(dtype, torch.float32)] * 2
    return [tensor.to(wanted).requires_grad_(requires_grad) for tensor, wanted in zip(tensors, dtypes, strict=True)]


def scan(x, gates, input_gate, output_gate=None, decay=None, scale=None, **options):
    """`propagate` with its tensors in the order of `operands`."""
    return propagate(x, gates, input_gate, output_gate, decay=decay, scale=scale, **options)


def test_a_compiler_gives_the_native_cpu_backend():
    import shutil

    assert ("native-cpu" in AVAILABLE) == (shutil.which(os.environ.get("CXX", "c++")) is not None)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_ones_count_the_lines_of_the_chunk(backend, direction, chunk):
    # Rows of the weights sum to 1, at the borders too, so that ones stay equal along a line and grow by λx = 1.
    h, w = 7, 5
    gates = torch.randn(1, h, w, 1, 3, 2)
    y = propagate(
        torch.ones(1, h, w, 4), gates, torch.ones(1, h, w, 1, 2), chunk=chunk, directions=[direction], backend=backend
    )
    lines = h if direction in ("down", "up") else w
    n = chunk or lines
    for line in range(lines):
        first, last = line // n * n, min(line // n * n + n, lines) - 1
        expected = line - first + 1 if direction in ("down", "right") else last - line + 1
        on_line = y[:, line] if direction in ("down", "up") else y[:, :, line]
        torch.testing.assert_close(on_line, torch.full_like(on_line, expected))


def rotate(tensor, order):
    """A quarter turn of the map, counter-clockwise; the K axis (if any) put into the given order."""
    turned = tensor.rot90(1, (1, 2))
    return turned if order is None else turned[:, :, :, order]


@pytest.mark.parametrize("chunk", [None, 2])
def test_rotating_the_map_rotates_the_output(backend, chunk):
    x, gates, input_gate, output_gate, decay, scale = operands(2, 6, 4, 6, 4, 3)
    y = scan(x, gates, input_gate, output_gate, decay, scale, chunk=chunk, backend=backend)
    # Under this turn a scan going down goes right, up → left, right → up, left → down. A neighbour at +1 along a row
    # lies at -1 along a column afterwards, while columns become rows in order.
    order = [3, 2, 0, 1]  # which old direction stands at down, up, right, left of the turned map
    turned_gates = rotate(gates, order)
    turned_gates = torch.cat([turned_gates[:, :, :, :2], turned_gates[:, :, :, 2:].flip(4)], dim=3)
    turned = scan(
        rotate(x, None),
        turned_gates,
        rotate(input_gate, order),
        rotate(output_gate, order),
        decay[order],
        scale[order],
        chunk=chunk,
        backend=backend,
    )
    torch.testing.assert_close(turned, rotate(y, None))


@pytest.mark.parametrize("chunk", [None, 2])
def test_flipping_the_map_flips_the_output(backend, chunk):
    x, gates, input_gate, output_gate, decay, scale = operands(1, 6, 4, 6, 4, 2)
    y = scan(x, gates, input_gate, output_gate, decay, scale, chunk=chunk, backend=backend)
    order = [1, 0, 2, 3]  # upside down: up and down change places, neighbours along a column too
    flipped_gates = gates.flip(1)[:, :, :, order]
    flipped_gates = torch.cat([flipped_gates[:, :, :, :2], flipped_gates[:, :, :, 2:].flip(4)], dim=3)
    flipped = scan(
        x.flip(1),
        flipped_gates,
        input_gate.flip(1)[:, :, :, order],
        output_gate.flip(1)[:, :, :, order],
        decay[order],
        scale[order],
        chunk=chunk,
        backend=backend,
    )
    torch.testing.assert_close(flipped, y.flip(1))


def test_chunk_of_the_map_is_global_and_chunk_of_one_is_pointwise(backend):
    x, _, input_gate, output_gate, _, scale = tensors = operands(1, 5, 7, 6, 4, 3)
    whole = scan(*tensors, backend=backend)
    for chunk in (7, 8, 100):
        torch.testing.assert_close(scan(*tensors, chunk=chunk, backend=backend), whole, rtol=0, atol=0)
    pointwise = (scale * (output_gate * input_gate).repeat_interleave(2, dim=-1)).sum(dim=3) * x
    torch.testing.assert_close(scan(*tensors, chunk=1, backend=backend), pointwise)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_line_is_forgotten_by_its_channels_factor(backend, direction):
    # λ is 1 and so is one token of x; weights sum to 1: the line that is n lines on sums to s fⁿ.
    h = w = 9
    x = torch.zeros(1, h, w, 2, dtype=torch.float64)
    x[:, 4, 4] = 1
    gates, input_gate = torch.zeros(1, h, w, 1, 3, 1).double(), torch.ones(1, h, w, 1, 1).double()
    gates[..., 1, :], gates[..., ::2, :] = 30, -30  # straight on
    decay, scale = torch.tensor([[0.5, 0.9]]).double(), torch.tensor([[2.0, -3.0]]).double()
    y = scan(x, gates, input_gate, None, decay, scale, directions=[direction], backend=backend)
    axis, back = (1, False) if direction == "down" else (1, True) if direction == "up" else (2, direction == "left")
    lines = (y.flip(axis) if back else y).movedim(axis, 1).sum(2)[0]
    ages = torch.arange(5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(lines[4:], scale * decay**ages)
    assert not lines[:4].any()


def test_a_logit_that_is_not_a_number_shows(backend):
    x, gates, input_gate, output_gate, *_ = operands(1, 6, 5, 8, 1, 8, dtype=torch.float32)
    gates[0, 3, 2, 0, 1, 4] = torch.nan
    y = propagate(x, gates, input_gate, output_gate, directions=["down"], backend=backend)
    want = propagate_reference(Call(x, gates, input_gate, output_gate, directions=[0]))
    assert torch.equal(y.isnan(), want.isnan())
    assert y.isnan().sum() == 1 + 3 + 5  # the token, and what lies in its reach below


SHAPES = [
    # B, H, W, C, K, G, chunk
    (2, 3, 5, 4, 4, 2, None),
    (1, 5, 3, 4, 4, 4, 2),
    (1, 1, 6, 3, 3, 1, 4),
    (1, 6, 1, 3, 2, 3, None),
    (2, 1, 1, 5, 4, 5, 1),
    (1, 7, 6, 5, 1, 1, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", ["output_gate decay scale", "scale", ""])
def test_gradcheck(backend, shape, given):
    *sizes, chunk = shape
    inputs = dict(
        zip(
            ("x", "gates", "input_gate", "output_gate", "decay", "scale"),
            operands(*sizes, requires_grad=True),
            strict=True,
        )
    )
    names = ["x", "gates", "input_gate", *given.split()]
    directions = DIRECTIONS[: sizes[4]]

    def function(*tensors):
        return scan(**dict(zip(names, tensors, strict=True)), chunk=chunk, directions=directions, backend=backend)

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names], fast_mode=True)


LARGER = [
    (2, 9, 13, 64, 4, 1, None),
    (1, 12, 8, 130, 4, 2, 4),  # a group wider than a slab, and not a multiple of it
    (1, 11, 5, 67, 4, 67, 3),
    (1, 70, 66, 32, 4, 2, None),  # a map large enough for narrow slabs
    (1, 66, 70, 48, 2, 48, 16),
    (3, 8, 8, 24, 4, 3, 2),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("name", [n for n in ON_CPU if n != "reference"])
@pytest.mark.parametrize(("shape", "dtype"), list(itertools.product(LARGER, TOLERANCE)), ids=str)
def test_kernels_agree_with_the_reference(name, shape, dtype):
    if name not in AVAILABLE:
        pytest.skip(find(name).status().detail)
    *sizes, chunk = shape
    inputs = operands(*sizes, dtype=dtype, requires_grad=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    directions = DIRECTIONS[-sizes[4] :]
    y = scan(*inputs, chunk=chunk, directions=directions, backend=name)
    codes = [DIRECTIONS.index(d) for d in directions]
    expected = propagate_reference(Call(*exact, chunk=chunk or 0, directions=codes))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(y, inputs, grad.to(dtype))
    exact_grads = torch.autograd.grad(expected, exact, grad.to(dtype).double())
    for like, ours, theirs in zip((inputs[0], *inputs), (y, *grads), (expected, *exact_grads), strict=True):
        assert ours.dtype == like.dtype
        scale = theirs.abs().max().clamp_min(1)
        torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("groups", [2, 32])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_memory_that_held_nan_leaves_no_trace(backend, groups, chunk):
    # A kernel's scratch is whatever was freed last: fill and free the sizes it asks for, then look for the filling.
    inputs = operands(2, 4, 4, 32, 4, groups, dtype=torch.float32, requires_grad=True)
    for _ in range(20):
        poison = [torch.full((size,), torch.nan) for size in (64, 128, 256, 512, 1024, 2048, 4096) for _ in range(8)]
        del poison
        y = scan(*inputs, chunk=chunk, backend=backend)
        assert all(torch.isfinite(tensor).all() for tensor in (y, *torch.autograd.grad(y.sum(), inputs)))


@pytest.mark.parametrize(
    ("height", "width", "dtype", "within"),
    [(4, 5, torch.float64, 1e-12), (16, 40, torch.float32, 1e-4)],  # tokens in eights: gates are read in vectors
)
def test_strides_are_the_callers(backend, height, width, dtype, within):
    x, gates, input_gate, output_gate, decay, scale = operands(1, height, width, 6, 4, 3, dtype=dtype)
    # a head that puts a group's 12 logits and 4 λ side by side, an x in channels-first memory, u by group
    head = torch.cat([gates.permute(0, 1, 2, 5, 3, 4).flatten(-2), input_gate.permute(0, 1, 2, 4, 3)], dim=-1)
    gate_view = head[..., :12].unflatten(-1, (4, 3)).permute(0, 1, 2, 4, 5, 3)
    input_gate_view = head[..., 12:].transpose(3, 4)
    x_view = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    output_gate_view = output_gate.mT.contiguous().mT
    assert not any(view.is_contiguous() for view in (gate_view, input_gate_view, x_view, output_gate_view))
    factors = decay.t().contiguous().t(), torch.stack([scale, scale], -1)[..., 0]
    for u, u_view in ((output_gate, output_gate_view), (None, None)):
        for order in (DIRECTIONS, ("left", "down", "right", "up")):
            results = []
            for tensors in (
                (x, gates, input_gate, u, decay, scale),
                (x_view, gate_view, input_gate_view, u_view, *factors),
            ):
                leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
                y = scan(*leaves, directions=order, backend=backend)
                results.append((y, *torch.autograd.grad(y.square().sum(), [t for t in leaves if t is not None])))
            for plain, viewed in zip(*results, strict=True):
                torch.testing.assert_close(viewed, plain, rtol=within, atol=within * plain.abs().max().item())
    one = torch.ones(1, 1, 1, 1, 1, dtype=x.dtype).expand_as(output_gate)
    torch.testing.assert_close(
        propagate(x, gates, input_gate, one, backend=backend), propagate(x, gates, input_gate, backend=backend)
    )


def test_weights_are_row_stochastic_for_logits_of_any_size():
    for scale in (0, 1, 1e4, -1e4):
        logits = torch.randn(6, 3, 2) + scale
        weights = line_weights(logits)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(dim=-2), torch.ones(6, 2))
        assert (weights[0, 0] == 0).all() and (weights[-1, 2] == 0).all()


@pytest.mark.parametrize("value", [1e4, -1e4, [1e4, -1e4, 0], [-1e4, -1e4, 1e4], [-1e4, -2e4, -3e4]])
def test_extreme_logits_stay_finite(backend, value):
    gates = torch.zeros(1, 4, 4, 4, 3, 1) + torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1)
    inputs = [torch.ones(1, 4, 4, 2), gates, torch.ones(1, 4, 4, 4, 1)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    y = propagate(*inputs, directions=DIRECTIONS, backend=backend)
    # h at line n of a direction is n: down + up = 5, right + left = 5
    torch.testing.assert_close(y, torch.full_like(y, 10.0))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.slow
def test_opcheck():
    forward, options = torch.ops.gspn_dit.propagate.default, (0, 2, 1, [0, 1, 2, 3])
    for name in AVAILABLE:
        inputs = operands(1, 4, 3, 4, 4, 2, dtype=torch.float32, requires_grad=True)
        for missing in ((), (3, 4, 5), (5,)):
            tensors = [None if i in missing else tensor for i, tensor in enumerate(inputs)]
            torch.library.opcheck(forward, (*tensors, *options, None, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_absent_arguments_have_empty_gradients_of_the_dtype_that_is_promised(backend, dtype):
    x, gates, input_gate, *_ = operands(1, 4, 3, 4, 4, 2, dtype=dtype)
    others, no_rms = (None, None, None, 2, 0, 0, [0, 1, 2, 3], None, backend), torch.empty(0)
    grads = torch.ops.gspn_dit.propagate_backward(x, None, no_rms, x, gates, input_gate, *others)
    on_meta, rms_on_meta, *meta = (t.to("meta") for t in (x, no_rms, x, gates, input_gate))
    promised = torch.ops.gspn_dit.propagate_backward(on_meta, None, rms_on_meta, *meta, *others)
    assert [(g.shape, g.dtype) for g in grads] == [(g.shape, g.dtype) for g in promised]
    assert [g.numel() for g in grads[3:]] == [0, 0, 0, 0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    inputs = operands(1, 4, 5, 8, 4, 2, dtype=torch.float32, requires_grad=True)

    def function(x, gates, input_gate, output_gate, decay, scale):
        return scan(x.sin(), gates, input_gate.sigmoid(), output_gate, decay, scale, chunk=2).square()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    y, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.sum(), inputs)
    for ours, theirs in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_threads_and_repeats_give_the_same_bits(backend):
    inputs = operands(2, 10, 9, 64, 4, 2, dtype=torch.float32, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            y = scan(*inputs, chunk=4, backend=backend)
            results.append((y, *torch.autograd.grad(y.sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_works_under_checkpointing():
    from torch.utils.checkpoint import checkpoint

    inputs = operands(1, 4, 4, 8, 4, 2, dtype=torch.float32, requires_grad=True)
    y = checkpoint(lambda *a: scan(*a, chunk=2), *inputs, use_reentrant=False)
    expected = scan(*inputs, chunk=2)
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert torch.equal(a, b)


def test_autocast_leaves_its_inputs_as_they_are(backend):
    """Float32 values are scanned in float32; what a linear layer makes of them under autocast, in bfloat16."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8 + 4 * 4 * 2)
    *inputs, _, decay, scale = operands(1, 4, 4, 8, 4, 2, dtype=torch.float32)
    options = {"decay": decay, "scale": scale, "chunk": 2, "backend": backend}

    def mixed():
        x, gates, input_gate = layer(inputs[0]).split((8, 24, 8), dim=-1)
        return propagate(x, gates.unflatten(-1, (4, 3, 2)), input_gate.unflatten(-1, (4, 2)), **options)

    with torch.autocast("cpu", torch.bfloat16):
        exact, rounded = propagate(*inputs, **options), mixed()
    assert torch.equal(exact, propagate(*inputs, **options))
    assert rounded.dtype == torch.bfloat16
    assert (rounded - mixed()).norm() < 0.02 * mixed().norm()
    (grad,) = torch.autograd.grad(rounded.float().square().sum(), layer.weight)
    (expected,) = torch.autograd.grad(mixed().square().sum(), layer.weight)
    assert (grad - expected).norm() < 0.03 * expected.norm()


def bad_calls():
    x, gates, input_gate, output_gate, decay, scale = operands(1, 4, 4, 6, 4, 3, dtype=torch.float32)
    yield "x", dict(x=x[0])
    yield "x", dict(x=x.long())
    yield "x", dict(x=x[:, :0])
    yield "gates", dict(gates=gates[:, :3])
    yield "gates", dict(gates=gates.transpose(3, 4))
    yield "gates", dict(gates=gates.double())
    yield "gates", dict(gates=gates.to("meta"))
    yield "input_gate", dict(input_gate=input_gate[..., :2].repeat(1, 1, 1, 1, 2))
    yield "input_gate", dict(input_gate=input_gate.bfloat16())
    yield "output_gate", dict(output_gate=output_gate[..., :1])
    yield "decay", dict(decay=decay[:3])
    yield "decay", dict(decay=decay.double())
    yield "scale", dict(scale=scale.bfloat16())
    yield "scale", dict(scale=scale[:, :3])
    yield "direct", dict(direct=scale)
    yield "direct", dict(direct=scale[0, :3])
    yield "direct", dict(direct=scale[0].bfloat16())
    yield "direct", dict(direct=scale[0].to("meta"))
    yield "chunk", dict(chunk=0)
    yield "chunk", dict(chunk=2.0)
    yield "directions", dict(directions=("down", "up", "right", "diagonal"))
    yield "directions", dict(directions=("down", "down", "right", "left"))
    yield "directions", dict(directions=())
    yield "gates", dict(directions=("down",))
    yield "backend", dict(backend="tpu")


@pytest.mark.parametrize(
    ("name", "change"), list(bad_calls()), ids=lambda v: v if isinstance(v, str) else next(iter(v))
)
def test_bad_input_is_named(name, change):
    x, gates, input_gate, output_gate, *_ = operands(1, 4, 4, 6, 4, 3, dtype=torch.float32)
    with pytest.raises(InputError, match=rf"^{name}\b"):
        propagate(**{**dict(x=x, gates=gates, input_gate=input_gate, output_gate=output_gate), **change})


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


@pytest.mark.slow
def test_without_a_compiler_the_reference_runs_and_one_warning_says_so(tmp_path):
    code = (
        "import torch; from gspn_dit.ops import propagate\n"
        "a = torch.ones(1, 3, 3, 2), torch.zeros(1, 3, 3, 4, 3, 1), torch.ones(1, 3, 3, 4, 1)\n"
        "for _ in range(3): y = propagate(*a)\n"
        "print(float(y[0, 0, 0, 0]))"
    )
    result = run(code, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "8.0"  # 1 + 3 + 1 + 3
    assert result.stderr.count("reference operator") == 1
    assert "no-such-compiler" in result.stderr


def test_a_compiler_that_fails_is_named(tmp_path):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'fatal error: out of patience' >&2\nexit 1\n")
    broken.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-m", "gspn_dit.ops"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CXX": str(broken), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")},
    )
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("native-cpu")]
    assert "not available" in line and "did not compile" in line
    assert not list((tmp_path / "cache").iterdir())  # nothing half-built is left


def test_report_names_every_backend():
    result = subprocess.run([sys.executable, "-m", "gspn_dit.ops"], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["reference", "native-cpu", "native-cuda"]
