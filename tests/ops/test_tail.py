"""`propagate` with `direct`: the scans' sum is normed by group and the values are added, in one differentiable call."""

import itertools

import pytest
import torch

from gspn_dit.layers.norm import group_rms_norm
from gspn_dit.ops import Call, FusesTail, Status, propagate, register, unregister
from gspn_dit.ops.backend import OPERANDS
from gspn_dit.ops.reference import DIRECTIONS, Reference, propagate_reference
from gspn_dit.ops.registry import find
from gspn_dit.ops.tail import EPSILON, apply_tail, tail_backward

NAMES = (*OPERANDS, "direct")
ALL = tuple(DIRECTIONS)
SHAPES = [
    # B, H, W, C, K, G, chunk
    (2, 3, 5, 4, 4, 2, None),
    (1, 5, 3, 6, 4, 1, 2),
    (1, 1, 6, 9, 3, 3, 4),
    (1, 6, 1, 6, 2, 3, None),
    (2, 9, 7, 130, 4, 2, 3),
    (1, 7, 6, 5, 1, 1, 2),
]


@pytest.fixture(params=["reference", "native-cpu"])
def backend(request):
    state = find(request.param).status()
    if not state.available:
        pytest.skip(f"{request.param}: {state.detail}")
    return request.param


def operands(b, h, w, c, k, g, *, dtype=torch.float64, requires_grad=True):
    """Random operands and direct, by name."""
    random = torch.Generator().manual_seed(0)
    shapes = (b, h, w, c), (b, h, w, k, 3, g), (b, h, w, k, g), (b, h, w, k, g), (k, c), (k, c), (c,)
    tensors = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    tensors[4] = tensors[4].sigmoid()
    of_a_channel = torch.promote_types(dtype, torch.float32)
    return {
        name: tensor.to(dtype if tensor.ndim > 2 else of_a_channel).requires_grad_(requires_grad)
        for name, tensor in zip(NAMES, tensors, strict=True)
    }


def by_definition(tensors, chunk=None, directions=ALL):
    """norm(Σ_k s_k u_k h_k) + d ⊙ x, by autograd."""
    *scanned, direct = (tensors[name] for name in NAMES)
    codes = [ALL.index(direction) for direction in directions]
    summed = propagate_reference(Call(*scanned, chunk=chunk or 0, directions=codes))
    return group_rms_norm(summed, tensors["input_gate"].shape[-1]) + direct * tensors["x"]


def gradients(y, tensors, **options):
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, list(tensors.values()), grad, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_norm_and_the_direct_path_with_their_gradients(backend, shape):
    *sizes, chunk = shape
    tensors, directions = operands(*sizes), ALL[: sizes[4]]
    y = propagate(**tensors, chunk=chunk, directions=directions, backend=backend)
    want = by_definition(tensors, chunk, directions)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    for name, got, wanted in zip(NAMES, gradients(y, tensors), gradients(want, tensors), strict=True):
        assert got.shape == tensors[name].shape
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7 * wanted.abs().max().item(), msg=name)


def test_of_a_channel_that_is_a_group_the_sign_is_left(backend):
    tensors = operands(1, 4, 5, 3, 4, 3, requires_grad=False)
    direct = tensors.pop("direct")
    signs = propagate(**tensors, backend=backend).sign()
    y = propagate(**tensors, direct=direct, backend=backend)
    torch.testing.assert_close(y, signs + direct * tensors["x"], rtol=0, atol=1e-2)


def test_gradients_agree_with_finite_differences(backend):
    tensors = operands(1, 4, 3, 6, 4, 2)

    def function(*values):
        return propagate(**dict(zip(NAMES, values, strict=True)), chunk=2, backend=backend)

    assert torch.autograd.gradcheck(function, list(tensors.values()), fast_mode=True)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}  # ‖got - float64‖ / ‖float64‖


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_types_of_less_precision_round_the_sum_and_the_result(backend, dtype):
    tensors = operands(2, 8, 9, 64, 4, 2, dtype=dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    y, want = propagate(**tensors, backend=backend), by_definition(exact)
    gots, wants = (y, *gradients(y, tensors)), (want, *gradients(want, exact))
    for name, got, wanted in zip(("y", *NAMES), gots, wants, strict=True):
        assert got.dtype == (torch.float32 if name in ("decay", "scale", "direct") else dtype)
        assert (got.double() - wanted).norm() < TOLERANCE[dtype] * wanted.norm(), name


def test_the_norm_reads_the_sum_in_the_type_of_x_and_y_is_rounded_once(backend):
    tensors = operands(1, 5, 6, 8, 4, 2, dtype=torch.bfloat16, requires_grad=False)
    direct = tensors.pop("direct")
    scanned = propagate(**tensors, backend=backend).double()
    want = group_rms_norm(scanned, 2) + direct.double() * tensors["x"].double()
    y = propagate(**tensors, direct=direct, backend=backend)
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-5)


def test_strides_are_the_callers(backend):
    tensors = operands(2, 4, 5, 6, 4, 3)
    x = tensors["x"].detach()
    views = {
        "channels first": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "every second channel": torch.stack([x, x], -1)[..., 0],
        "a part of a wider map": torch.cat([x, x], -1)[..., :6],
    }
    direct = torch.stack([tensors["direct"].detach()] * 2, -1)[..., 0].requires_grad_()
    want = by_definition(tensors)
    wants = gradients(want, tensors, retain_graph=True)
    for name, view in views.items():
        changed = {**tensors, "x": view.requires_grad_(), "direct": direct}
        y = propagate(**changed, backend=backend)
        assert y.stride() == torch.empty_like(view).stride(), name
        torch.testing.assert_close(y, want)
        for got, wanted in zip(gradients(y, changed, retain_graph=True), wants, strict=True):
            torch.testing.assert_close(got, wanted)
        summed = (result.sum() for result in (y, want))  # their gradient is one number, expanded to the map
        (got,), (wanted,) = (torch.autograd.grad(number, tensors["gates"], retain_graph=True) for number in summed)
        torch.testing.assert_close(got, wanted)


def test_a_group_of_zeros_stays_zero_with_finite_gradients(backend):
    tensors = operands(1, 3, 4, 6, 4, 2)
    x = tensors["x"].detach().clone()
    x[..., :3] = 0
    tensors["x"] = x.requires_grad_()
    y = propagate(**tensors, backend=backend)
    assert not y[..., :3].any() and y[..., 3:].all()
    assert all(grad.isfinite().all() for grad in gradients(y, tensors, retain_graph=True))
    (grad,) = torch.autograd.grad(y.sum(), tensors["x"])
    assert grad[..., :3].abs().max() > 100  # there the norm is a factor of 1 / √ε = 1000


def test_the_inverse_root_mean_square_is_of_each_token_and_group():
    scanned = torch.tensor([3.0, 3.0, 0.0, 0.0, 5.0, -5.0]).view(1, 1, 1, 6)
    y, inverse_rms = apply_tail(scanned, torch.zeros(1, 1, 1, 6), torch.ones(6), 3)
    torch.testing.assert_close(inverse_rms.flatten(), torch.tensor([1 / 3, EPSILON**-0.5, 1 / 5]))
    torch.testing.assert_close(y.flatten(), torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, -1.0]))


@pytest.mark.parametrize("size", [1, 16])
def test_a_direct_path_above_the_norm_costs_its_gradient_what_rounding_costs_y(size):
    """norm(m) is y - d ⊙ x: y's last place is that of d ⊙ x, so where this is `size`, norm(m) is `size` as coarse."""
    tensors = operands(1, 16, 16, 64, 4, 1, dtype=torch.bfloat16, requires_grad=False)
    scanned, x, direct = tensors["x"], tensors["x"].flip(1), torch.full((64,), float(size))
    y, inverse_rms = apply_tail(scanned.clone(), x, direct, 1)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    grad_scanned, _ = tail_backward(grad.bfloat16(), y, inverse_rms, x, direct)
    exact = scanned.double().requires_grad_()
    (want,) = torch.autograd.grad(group_rms_norm(exact, 1), exact, grad.bfloat16().double())
    assert (grad_scanned.double() - want).norm() < 2**-8 * (1 + size / 8) * want.norm()


@pytest.mark.parametrize("name", NAMES)
def test_one_operand_alone_may_have_a_gradient(backend, name):
    tensors = operands(1, 4, 3, 4, 4, 2)
    (want,) = torch.autograd.grad(by_definition(tensors).square().sum(), tensors[name])
    alone = {other: tensor.detach().requires_grad_(other == name) for other, tensor in tensors.items()}
    (got,) = torch.autograd.grad(propagate(**alone, backend=backend).square().sum(), alone[name])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("given", ["", "scale", "output_gate decay"])
def test_other_operands_may_be_absent(backend, given):
    tensors = operands(1, 4, 3, 4, 4, 2)
    present = {name: tensors[name] for name in ("x", "gates", "input_gate", *given.split(), "direct")}
    want = by_definition({**dict.fromkeys(NAMES), **present})
    y = propagate(**present, backend=backend)
    for got, wanted in zip((y, *gradients(y, present)), (want, *gradients(want, present)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_operands_and_results_may_be_used_twice(backend):
    tensors = operands(1, 4, 5, 6, 4, 3)

    def twice(function):
        y = function(tensors)
        again = function({**tensors, "x": y})
        return y.sin() * again + tensors["direct"]

    got, want = twice(lambda values: propagate(**values, backend=backend)), twice(by_definition)
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(gradients(got, tensors), gradients(want, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_without_gradients_nothing_is_kept(backend):
    tensors = operands(1, 4, 5, 6, 4, 3)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None)
    with hooks, torch.no_grad():
        y = propagate(**tensors, backend=backend)
    assert not kept and not y.requires_grad
    torch.testing.assert_close(y, propagate(**tensors, backend=backend).detach())


def kept_bytes(function):
    """Bytes of the memory that a call keeps for its backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function()
    return sum(kept.values()), y


def test_beyond_what_goes_in_and_out_a_number_a_group_is_kept(backend):
    tensors = operands(2, 4, 5, 12, 4, 3, dtype=torch.float32)
    inside = sum(tensor.nbytes for tensor in tensors.values())
    kept, y = kept_bytes(lambda: propagate(**tensors, backend=backend))
    assert kept == inside + y.nbytes + 2 * 4 * 5 * 3 * 4
    direct = tensors.pop("direct")
    assert kept_bytes(lambda: propagate(**tensors, backend=backend))[0] == inside - direct.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_of_it(backend, dtype):
    for of_x in (torch.float32, dtype):
        tensors = operands(1, 4, 5, 6, 4, 3, dtype=of_x)
        want = propagate(**tensors, backend=backend)
        wants = gradients(want, tensors)
        with torch.autocast("cpu", dtype):
            y = propagate(**tensors, backend=backend)
            gots = gradients(y, tensors)
        assert y.dtype == of_x
        for got, wanted in zip((y, *gots), (want, *wants), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    tensors = operands(1, 4, 5, 8, 4, 2, dtype=torch.float32)

    def function(tensors):
        y = propagate(**{**tensors, "x": tensors["x"].sin()}, chunk=2)
        return y.square() + propagate(**tensors)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    y, want = compiled(tensors), function(tensors)
    for got, wanted in zip((y, *gradients(y, tensors)), (want, *gradients(want, tensors)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_exports_and_the_program_gives_the_same(tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, x, gates, input_gate, direct):
            return propagate(x, gates, input_gate, direct=direct, chunk=2)

    tensors = operands(1, 4, 5, 8, 4, 2, dtype=torch.float32, requires_grad=False)
    given = tuple(tensors[name] for name in ("x", "gates", "input_gate", "direct"))
    torch.export.save(torch.export.export(Layer(), given), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    assert torch.equal(program(*given), Layer()(*given))


@pytest.mark.slow
def test_opcheck(backend):
    forward, options = torch.ops.gspn_dit.propagate.default, (2, 0, 0, [0, 1, 2, 3])
    for given, dtype in itertools.product((NAMES, ("x", "gates", "input_gate", "direct")), (torch.float32, torch.half)):
        tensors = operands(1, 4, 3, 4, 4, 2, dtype=dtype)
        *scanned, direct = (tensors[name] if name in given else None for name in NAMES)
        torch.library.opcheck(forward, (*scanned, *options, direct, backend), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_comes_is_what_the_fake_promises(backend, dtype):
    x, gates, input_gate, *_, direct = operands(1, 4, 3, 4, 4, 2, dtype=dtype, requires_grad=False).values()
    for view, tail in ((x, direct), (x.mT.contiguous().mT, direct), (x, None)):
        inputs = (view, gates, input_gate, None, None, None, 2, 0, 0, [0, 1, 2, 3], tail, backend)
        meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in inputs]
        results = []
        for arguments in (inputs, meta):
            y, inverse_rms = torch.ops.gspn_dit.propagate(*arguments)
            saved = (y if tail is not None else None, inverse_rms)
            grads = torch.ops.gspn_dit.propagate_backward(torch.ones_like(y), *saved, *arguments)
            results.append([(t.shape, t.dtype, t.stride()) for t in (y, inverse_rms, *grads)])
        assert results[0] == results[1]
        assert len(results[0]) == 2 + len(NAMES)


@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_give_the_same_bits(backend, threads):
    tensors = operands(2, 10, 9, 64, 4, 2, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for number in (threads, 1):
            torch.set_num_threads(number)
            y = propagate(**tensors, backend=backend)
            results.append((y, *gradients(y, tensors)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


class Scans:
    """A backend as someone else would add one: it knows nothing of a tail."""

    name, device_types, priority = "scans-alone", ("cpu",), 200

    def __init__(self):
        self.ran = []

    def status(self, device=None):
        return Status(True, "made for a test")

    def supports(self, call, backward=False):
        return None

    def forward(self, call):
        self.ran.append("forward")
        return Reference().forward(call)

    def backward(self, grad, call):
        self.ran.append("backward")
        return Reference().backward(grad, call)


class Fused(Scans):
    """One that has a tail in the passes named, and marks its results."""

    name = "with-a-tail"

    def __init__(self, *passes):
        super().__init__()
        self.passes = passes

    def supports_tail(self, call, backward=False):
        return ("backward" if backward else "forward") in self.passes

    def forward_with_tail(self, call, direct):
        self.ran.append("forward with tail")
        return apply_tail(Reference().forward(call), call.x, direct, call.input_gate.shape[-1])

    def backward_with_tail(self, grad, y, inverse_rms, call, direct):
        self.ran.append("backward with tail")
        grad_scanned, grad_direct = tail_backward(grad, y, inverse_rms, call.x, direct)
        grad_x, *others = Reference().backward(grad_scanned, call)
        return grad_x + direct * grad, *others, grad_direct


@pytest.mark.parametrize(
    ("added", "ran"),
    [
        (Scans(), ["forward", "backward"]),
        (Fused(), ["forward", "backward"]),
        (Fused("forward"), ["forward with tail", "backward"]),
        (Fused("backward"), ["forward", "backward with tail"]),
        (Fused("forward", "backward"), ["forward with tail", "backward with tail"]),
    ],
)
def test_a_backend_may_have_a_tail_of_its_own_in_either_pass(added, ran):
    tensors = operands(1, 4, 5, 6, 4, 2)
    assert isinstance(added, FusesTail) == isinstance(added, Fused)
    register(added)
    try:
        y = propagate(**tensors)
        gots = gradients(y, tensors)
        assert added.ran == ran
        without = {name: tensor for name, tensor in tensors.items() if name != "direct"}
        gradients(propagate(**without), without)
        assert added.ran[2:] == ["forward", "backward"]
    finally:
        unregister(added.name)
    want = by_definition(tensors)
    for got, wanted in zip((y, *gots), (want, *gradients(want, tensors)), strict=True):
        torch.testing.assert_close(got, wanted)
