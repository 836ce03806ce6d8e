"""The one-pass kernels of `gspn_dit.ops.passes`: interpreted, compiled for GPUs that are not here, and on one."""

from __future__ import annotations

import importlib.util
import operator
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gspn_dit.layers.fused as fused
from gspn_dit.models import create_model
from gspn_dit.ops import passes
from gspn_dit.ops.passes import take

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


def test_what_runs_on_a_cpu_is_the_composition():
    assert not take(torch.ones(2, 4, 4, 32))
    assert not take(torch.ones(2, 4, 4, 32, device="meta"))


def test_torch_compile_does_not_look_into_what_a_gpu_is():
    graph = torch.compile(lambda x: x + passes.runs_kernels(torch.device("cuda")), backend="eager", fullgraph=True)
    assert graph(torch.ones(1)) == 1 + torch.cuda.is_available()


def test_the_composition_is_what_it_says():
    x, branch = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16)
    modulation = torch.randn(2, 1, 1, 3, 16)
    gate, shift, scale = modulation.unbind(-2)
    total, y = fused.gated_residual_norm(x, branch, modulation)
    assert torch.equal(total, fused.gated_residual(x, branch, [gate]))
    normal = (total - total.mean(-1, keepdim=True)) / (total.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(y, normal * (1 + scale) + shift)
    assert torch.equal(y, fused.modulated_norm(total, modulation[..., 1:, :]))


def test_an_offset_is_added_to_the_modulation_of_each_pass():
    x, branch = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16)
    modulation, offset = torch.randn(2, 1, 1, 6, 16), torch.randn(1, 1, 1, 6, 16)

    def block(first, second, last):
        total, y = fused.gated_residual_norm(x, fused.modulated_norm(x, *first) * branch, *second)
        return fused.gated_residual(total, y, *last)

    y = block(*fused.modulations(x, modulation, offset))
    assert torch.equal(y, block(*fused.modulations(x, modulation + offset)))
    assert torch.equal(y, block(*zip(modulation.split((2, 3, 1), -2), offset.split((2, 3, 1), -2), strict=True)))
    assert not torch.equal(y, block(*fused.modulations(x, modulation)))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there: its tensors are made, and what is tried on it runs on the CPU."""
    if torch.__version__ < "2.11":
        pytest.skip("fake CUDA tensors ask torch 2.8 for a driver")
    is_right = passes.is_right
    monkeypatch.setattr(passes, "is_right", lambda device: is_right(torch.device("cpu")))
    monkeypatch.setattr(passes, "_works", {})
    monkeypatch.setattr(passes, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode(), torch.device("cuda"):
        yield lambda *shape: torch.empty(shape)


@pytest.fixture
def tried(monkeypatch):
    """What the smallest pass does when it is tried, in place of a launch; the calls are counted."""
    calls = []

    def pretend(does):
        def squared_relu(x):
            assert type(x) is torch.Tensor and not torch.is_autocast_enabled("cpu")
            calls.append(x)
            return does(x)

        # In place of a module that needs Triton to be imported.
        monkeypatch.setitem(sys.modules, "gspn_dit.ops.passes.operators", SimpleNamespace(squared_relu=squared_relu))
        monkeypatch.setattr(passes, "operators", SimpleNamespace(squared_relu=squared_relu), raising=False)
        return calls

    return pretend


def no_headers(x):
    raise RuntimeError("fatal error: Python.h: No such file\n or directory")


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (no_headers, "RuntimeError: fatal error: Python.h: No such file or directory"),
        (lambda x: x.relu(), "a wrong result"),
        (lambda x: x.relu().square() * torch.nan, "a wrong result"),
    ],
)
def test_kernels_that_do_not_work_are_warned_of_once_and_left(gpu, tried, does, reason):
    """Asked under a mode that makes no real tensors, with autocast on."""
    calls, x = tried(does), gpu(64, 32, 32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match=re.escape(f"no Triton kernels on cuda:0 ({reason})")):
            assert not take(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not take(x)
            assert fused.squared_relu(x).shape == x.shape  # by the composition
    assert len(calls) == 1


def test_kernels_that_work_are_tried_once_and_not_while_a_graph_is_recorded(gpu, tried, monkeypatch):
    calls, x = tried(lambda x: x.relu().square()), gpu(64, 32, 32, 64)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not take(x) and not calls
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert take(x) and take(x) and len(calls) == 1


def test_kernels_are_tried_while_torch_compile_traces(tried):
    calls = tried(lambda x: x.relu().square())
    works = torch.compiler.assume_constant_result(lambda: passes.fault_of(torch.device("cpu")) is None)
    graph = torch.compile(lambda x: x + works(), backend="eager", fullgraph=True)
    assert graph(torch.ones(1)) == 2 and graph(torch.zeros(1)) == 1
    assert len(calls) == 1


def test_modulations_that_are_no_vectors_are_left_to_the_composition(gpu, tried):
    tried(lambda x: x.relu().square())
    x = gpu(64, 32, 32, 64)
    for shape in (64, 1, 1, 3, 64), (1, 1, 1, 3, 64):
        assert take(x, gpu(*shape)) and take(x, gpu(*shape), gpu(1, 1, 1, 3, 64)) and take(x, gpu(*shape), None)
    for shape in (64, 32, 32, 3, 64), (64, 1, 32, 3, 64), (64, 1, 1, 3, 1), (3, 64), (1, 1, 3, 64):
        assert not take(x, gpu(*shape)) and not take(x, gpu(1, 1, 1, 3, 64), gpu(*shape))
        assert fused.gated_residual_norm(x, x, gpu(*shape))[1].shape == x.shape
        assert fused.gated_residual_norm(x, x, gpu(64, 1, 1, 3, 64), gpu(*shape))[1].shape == x.shape
    for shape in (64, 1, 1, 64), (64, 32, 32, 64), (1, 64), (64,), (1,), ():
        assert not take(x, [gpu(*shape)] * 2)
        assert fused.modulated_norm(x, [gpu(*shape)] * 2).shape == x.shape
    assert fused.gated_residual(x, gpu(1, 32, 32, 64), gpu(1, 1, 1, 1, 64)).shape == x.shape  # a branch's other shape
    assert not take(gpu()) and fused.squared_relu(gpu()).shape == ()


@needs_triton
@pytest.mark.slow
def test_which_maps_the_kernels_take_and_what_turns_them_off():
    """Asked of made GPU tensors, in processes of their own: the variable is read once."""
    ask = """
import os, torch, triton
from torch._subclasses.fake_tensor import FakeTensorMode
os.environ["GSPN_DIT_FUSED"] = str(int(os.fork() == 0))  # the child is asked first
if os.environ["GSPN_DIT_FUSED"] == "0":
    assert os.wait()[1] == 0
from gspn_dit.ops.passes import take
from gspn_dit.ops import passes
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda device: (9, 0)
torch.cuda.is_current_stream_capturing, torch.cuda.current_device = lambda: False, lambda: 0
passes.fault_of = lambda device: None
with FakeTensorMode(), torch.device("cuda"):
    for channels, dtype in (64, torch.float32), (64, torch.bfloat16), (64, torch.float64), (9000, torch.half):
        print(take(torch.empty(64, 32, 32, channels, dtype=dtype)), end=" ")
    print(take(torch.empty(2, 4, 4, 64)), end=" ")
    torch.compiler.is_compiling = lambda: True
    print(take(torch.empty(2, 4, 4, 64)))
"""
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True True False False False True", " ".join(["False"] * 6)]


@needs_triton
@pytest.mark.parametrize("name", ["gspn-dit-ti-2", "dit-ti-2"])
def test_a_compiled_block_hands_views_of_its_modulation_to_the_passes(name, monkeypatch):
    """Between the model's modulation, or the linear layer of the block's own, and a pass nothing is computed."""
    monkeypatch.setattr(fused, "take", lambda x, *modulations: True)
    block, operands = block_and_operands(name)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        raise NotImplementedError("nothing is to be run")

    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(block, backend=backend, fullgraph=True)(*operands)
    found = []
    for node in graphs[0].graph.nodes:
        if "norm" in str(node.target) or "gated" in str(node.target):
            maps = 1 if node.target is torch.ops.gspn_dit.modulated_norm.default else 2
            found += [origin(operand) for operand in node.args[maps:] if operand is not None]
    linear = "<built-in function linear>"
    assert found == (["L_modulation_", linear] * 3 if name.startswith("gspn") else [linear] * 3)


def origin(node):
    """The target of what a node is a view of."""
    while node.target in ("split", "expand", "view", "unflatten", operator.getitem):
        node = node.args[0]
    return str(node.target)


@needs_triton
@pytest.mark.slow
def test_the_kernels_interpreted():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    tests = Path(__file__).with_name("interpreted_passes.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=tests.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code_for_xl(capability, tmp_path):
    """Nothing spills, maps are read and written 16 bytes at a time, and two blocks fit a multiprocessor's registers."""
    from made.compiled_pass import kernels_of_a_block

    for name, code in kernels_of_a_block(1152, capability, tmp_path).items():
        assert code.spilled == 0, name
        assert 2 * code.threads * code.registers <= 65536, (name, code)
        nine_weights = {16: 72} if name in ("depthwise_conv", "depthwise_conv backward") else {}  # of 8 channels each
        statistics = {32: 2} if "modulated_norm" in name or "residual_norm" in name else {}  # mean and deviation
        forward = " " not in name
        assert widths_but_128(code.loads) == nine_weights | ({} if forward else statistics)
        if name == "depthwise_conv weights":
            assert code.stores == {32: 10}  # sums alone
        else:
            assert widths_but_128(code.stores) == (statistics if forward else {}), name


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith("2.14"), reason="what a GPU is asked by another torch differs")
def test_what_torch_compile_generates_for_a_gpu():
    """Of a block: its passes, and casts for the operator. Of its feed-forward half, tuned: two products, no more."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "made.code_for_a_gpu", "block", "tuned"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))},
        capture_output=True,
        text=True,
    )
    _, block, tuned = re.split(r"^### (?:block|tuned)\n", done.stdout, flags=re.MULTILINE)
    of_block, of_half = (re.findall(r"^ +(\w+)\.run\(", code, re.MULTILINE) for code in (block, tuned))
    assert of_block and of_half, done.stderr[-4000:]
    ours = [re.sub(r"_\d+$", "", name) for name in of_block if not name.startswith("triton_")]
    assert ours == ["norm_forward", "conv_forward", "norm_forward", "squared_relu_forward", "norm_forward"]
    assert all("_to_copy" in name and "add" not in name for name in of_block if name.startswith("triton_"))
    first, second = of_half
    assert first.startswith("triton_tem_fused_addmm_mul_relu") and second.startswith("triton_tem_fused_addmm")
    assert "extern_kernels." not in tuned.partition("def call")[2]


def widths_but_128(accesses):
    return {width: count for width, count in accesses.items() if width != 128}


MAP = (2, 16, 16, 192)
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def block_and_operands(name: str) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    block = create_model(name, depth=2).blocks[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    width = MAP[-1]
    condition = [torch.randn(2, 1, 1, 6, width), torch.randn(2, 1, 1, width // 4)]
    if name.startswith("dit"):
        condition = [torch.randn(2, 1, 1, width)]
    return block, [torch.randn(MAP), *condition]


def block_on_gpu(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    block, operands = block_and_operands(name)
    return block.to("cuda", dtype), [operand.to("cuda", dtype).requires_grad_() for operand in operands]


def outcome(block, operands):
    y = block(*operands)
    wanted = [*operands, *block.parameters()]
    return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y).cumsum(-1) / y.shape[-1])]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gspn-dit-ti-2", "dit-ti-2"])
def test_a_block_on_a_gpu(name, dtype, compiled, monkeypatch):
    """Result and gradients are as close to float32's as the compositions' are, and the same bits twice."""
    monkeypatch.setattr(passes, "SMALLEST_EAGER", 0)
    monkeypatch.setattr(passes, "WANTED", False)
    exact, plain = outcome(*block_on_gpu(name, torch.float32)), outcome(*block_on_gpu(name, dtype))
    monkeypatch.setattr(passes, "WANTED", True)
    block, operands = block_on_gpu(name, dtype)
    if compiled:
        torch.compiler.reset()
        block = torch.compile(block, dynamic=False, fullgraph=True)
    got, again = outcome(block, operands), outcome(block, operands)
    for value, repeated, composed, reference in zip(got, again, plain, exact, strict=True):
        assert torch.equal(value, repeated)
        assert distance(value, reference) < 3 * distance(composed, reference) + 1e-4


def distance(value, reference):
    """The largest difference, over the largest number of the reference."""
    return ((value.float() - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.gpu
@pytest.mark.slow
def test_a_compiled_block_takes_maps_of_any_size(monkeypatch):
    """With torch.compile's dynamic shapes."""
    block, operands = block_on_gpu("gspn-dit-ti-2", torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(block, dynamic=True, fullgraph=True)
    for height, width in ((16, 16), (8, 24), (5, 7)):
        x = operands[0][:, :1, :1].detach().expand(2, height, width, -1) + torch.randn(height, width, 1, device="cuda")
        monkeypatch.setattr(passes, "WANTED", False)
        plain = block(x, *operands[1:])
        monkeypatch.setattr(passes, "WANTED", True)
        torch.testing.assert_close(compiled(x, *operands[1:]), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 16, 16, 1152), (3, 13, 11, 100), (1, 5, 7, 33), (2, 1, 6, 8), (1, 130, 20, 64)])
def test_each_pass_on_a_gpu(shape, dtype, monkeypatch):
    """As the composition in float64 on the CPU, result and gradients."""
    monkeypatch.setattr(passes, "SMALLEST_EAGER", 0)
    torch.manual_seed(0)
    channels = shape[-1]
    modulation, offset = torch.randn(2, shape[0], 1, 1, 6, channels, dtype=dtype)
    first, second, last = zip(modulation.split(fused.PASSES, -2), offset.split(fused.PASSES, -2), strict=True)
    x, branch = torch.randn(2, *shape, dtype=dtype)
    weight, bias = torch.randn(channels, 1, 3, 3, dtype=dtype), torch.randn(channels, dtype=dtype)
    for function, *operands in (
        (fused.modulated_norm, x, *first),
        (fused.modulated_norm, x, first[0]),
        (fused.gated_residual, x, branch, *last),
        (fused.gated_residual, x, branch, last[0]),
        (fused.gated_residual_norm, x, branch, *second),
        (fused.gated_residual_norm, x, branch, second[0]),
        (fused.squared_relu, x),
        (fused.depthwise_conv, x, weight, bias),
    ):
        exact = gradients(function, [operand.double() for operand in operands])
        for value, reference in zip(gradients(function, [o.cuda() for o in operands]), exact, strict=True):
            error = (value.cpu().double() - reference).abs().max() / reference.abs().max()
            assert error < DTYPES[dtype], (function.__name__, error)


def gradients(function, operands):
    operands = [operand.detach().requires_grad_() for operand in operands]
    results = function(*operands)
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.ones_like(result).cumsum(-1) / result.shape[-1] for result in results]
    return [*results, *torch.autograd.grad(results, operands, grads)]
