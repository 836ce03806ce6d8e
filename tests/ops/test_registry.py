"""Which backend runs a call, and what is said of those that cannot."""

import subprocess
import sys

import pytest
import torch

from gspn_dit.errors import InputError
from gspn_dit.ops import Call, Status, propagate, register, unregister
from gspn_dit.ops.reference import Reference
from gspn_dit.ops.registry import backends, choose, find, require_kernels


class OnlyFloat32:
    """A backend as someone else would add one: it takes float32 alone, and notes what it is asked to run."""

    name = "only-float32"
    device_types = ("cpu",)

    def __init__(self, priority=200, available=True):
        self.priority = priority
        self.available = available
        self.ran = []

    def status(self, device=None):
        return Status(self.available, "made for a test")

    def supports(self, call, backward=False):
        return None if call.x.dtype == torch.float32 else f"x has dtype {call.x.dtype}, and it takes float32"

    def forward(self, call):
        self.ran.append("forward")
        return Reference().forward(call)

    def backward(self, grad, call):
        self.ran.append("backward")
        return Reference().backward(grad, call)


@pytest.fixture
def added():
    """Registers backends, and unregisters after the test those that are left."""
    before = {backend.name for backend in backends()}

    def add(backend):
        register(backend)
        return backend

    yield add
    for name in {backend.name for backend in backends()} - before:
        unregister(name)


@pytest.fixture
def without_native_cpu():
    native = find("native-cpu")
    unregister("native-cpu")
    yield
    register(native)


def operands(dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    shapes = (1, 4, 5, 6), (1, 4, 5, 4, 3, 2), (1, 4, 5, 4, 2)
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def results(tensors, **options):
    y = propagate(*tensors, **options)
    return y, *torch.autograd.grad(y.float().square().sum(), tensors)


def test_a_third_backend_runs_the_calls_that_it_supports_and_no_others(added):
    before = {dtype: results(operands(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    third = added(OnlyFloat32())
    for got, want in zip(results(operands()), before[torch.float32], strict=True):
        torch.testing.assert_close(got, want)
    assert third.ran == ["forward", "backward"]
    for dtype in (torch.bfloat16, torch.float64):
        for got, want in zip(results(operands(dtype)), before[dtype], strict=True):
            assert torch.equal(got, want)  # the same backend as before
    assert third.ran == ["forward", "backward"]
    unregister("only-float32")
    assert choose(Call(*operands())).name != "only-float32"
    added(OnlyFloat32())  # its name is free again


def test_a_backend_is_asked_about_windows_and_gets_no_call_that_it_declines(added):
    class WithoutWindows(OnlyFloat32):
        def supports(self, call, backward=False):
            return f"it has no windows, and window is {call.window}" if call.window else super().supports(call)

    third = added(WithoutWindows())
    windowed = {"window": 3, "shift": 1}
    wanted = results(operands(), backend="reference", **windowed)
    for got, want in zip(results(operands(), **windowed), wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert third.ran == []
    results(operands(), chunk=3)
    assert third.ran == ["forward", "backward"]
    with pytest.raises(InputError, match="cannot run this call: it has no windows, and window is 3"):
        propagate(*operands(), **windowed, backend="only-float32")


def test_a_backend_of_low_priority_or_one_that_is_missing_runs_no_call_by_itself(added):
    added(OnlyFloat32(priority=1))
    native = find("native-cpu")
    if native.status().available:
        assert choose(Call(*operands())) is native
    assert choose(Call(*operands()), "only-float32").name == "only-float32"
    unregister("only-float32")
    added(OnlyFloat32(available=False))
    assert choose(Call(*operands())).name != "only-float32"


def test_a_named_backend_runs_the_call_or_says_why_not(added):
    third = added(OnlyFloat32(priority=1))
    results(operands(), backend="only-float32")
    assert third.ran == ["forward", "backward"]
    with pytest.raises(InputError, match=r"^backend='only-float32'.*dtype torch.bfloat16, and it takes float32"):
        propagate(*operands(torch.bfloat16), backend="only-float32")
    third.available = False
    with pytest.raises(InputError, match=r"^backend='only-float32': not available here: made for a test"):
        propagate(*operands(), backend="only-float32")
    with pytest.raises(InputError, match=r"^backend='native-cuda': the tensors are on cpu"):
        propagate(*operands(), backend="native-cuda")


@pytest.mark.usefixtures("without_native_cpu")
def test_where_the_reference_is_left_one_warning_says_why(added):
    added(OnlyFloat32())
    inputs = operands(torch.float64)
    with pytest.warns(UserWarning, match=r"reference operator.*only-float32: x has dtype torch.float64") as said:
        got = [results(inputs) for _ in range(3)]
    assert len(said) == 1
    for ours, wanted in zip(got[-1], results(inputs, backend="reference"), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.usefixtures("without_native_cpu")
def test_a_device_without_kernels_is_named():
    with pytest.raises(InputError, match="no kernel runs on cpu"):
        require_kernels(torch.device("cpu"))
    with pytest.warns(UserWarning, match="reference operator.*there is no kernel for cpu tensors"):
        assert choose(Call(*operands())).name == "reference"


def test_kernels_that_are_missing_are_named_with_the_cause(added):
    added(OnlyFloat32())
    require_kernels(torch.device("cpu"))  # one is there
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="native-cuda: torch sees no CUDA device"):
            require_kernels(torch.device("cuda"))


def test_names_are_taken_once_and_the_reference_stays(added):
    added(OnlyFloat32())
    with pytest.raises(ValueError, match="only-float32"):
        register(OnlyFloat32())
    with pytest.raises(ValueError, match="reference"):
        unregister("reference")
    with pytest.raises(InputError, match="nobody"):
        unregister("nobody")


def test_no_backend_is_named_as_a_device_is():
    for backend in backends():
        with pytest.raises(RuntimeError):
            torch.device(backend.name)


@pytest.mark.slow
@pytest.mark.parametrize("old", ["cpu", "cuda"])
def test_a_name_of_before_is_refused_with_its_successor(old):
    with pytest.raises(InputError, match=rf"^backend='{old}'.*'native-{old}'"):
        propagate(*operands(), backend=old)
    command = [sys.executable, "-m", "gspn_dit.ops", "--require", old]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f"'native-{old}'" in line


def test_a_compiled_call_may_name_its_backend(added):
    third = added(OnlyFloat32(priority=1))

    def function(*tensors):
        return propagate(*tensors, chunk=2, backend="only-float32").square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = operands()
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert third.ran == ["forward", "forward"]


def test_importing_the_room_loads_nothing():
    code = "import sys, gspn_dit.ops; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
