"""Blocks through torch.compile: what each mode leaves to Inductor, and that both compute the same."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

import gspn_dit.layers.fused as fused
from gspn_dit.models import create_model
from gspn_dit.models.compiled_blocks import TORCH_MODES, compile_block, compile_blocks


@pytest.mark.parametrize("mode", TORCH_MODES)
@pytest.mark.parametrize(("name", "blocks"), [("gspn-dit-ti-2", 3), ("gspn-ti-2", 3), ("dit-ti-2", 3)])
def test_every_block_is_compiled_in_torch_s_mode(name, blocks, mode, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    model = create_model(name, depth=blocks, sample_size=8)
    compile_blocks(model, mode)
    compile_block(model.blocks[0], mode)
    assert [module for module, _ in compiled] == [*model.blocks, model.blocks[0]]
    assert all(options == {"dynamic": False, "mode": TORCH_MODES[mode]} for _, options in compiled)


def block_and_operands():
    torch.manual_seed(0)
    block = create_model("gspn-dit-ti-2", depth=3, sample_size=8).blocks[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return block, [torch.randn(2, 4, 4, 192), torch.randn(2, 1, 1, 6, 192), torch.randn(2, 1, 1, 48)]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
@pytest.mark.parametrize("mode", TORCH_MODES)
def test_the_squared_relu_is_an_operator_unless_it_may_join_the_product(mode, monkeypatch):
    """As torch.compile sees a block on a GPU: the other passes are operators in both modes."""
    monkeypatch.setattr(fused, "take", lambda x, *modulations: True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        raise NotImplementedError("nothing is to be run")

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode, **options: compile_module(self, backend=backend, **options)
    )
    block, operands = block_and_operands()
    torch.compiler.reset()
    compile_block(block, mode)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        block(*operands)
    found = {str(node.target).removeprefix("gspn_dit.") for node in graphs[0].graph.nodes}
    passes = {"modulated_norm.default", "gated_residual_norm.default", "gated_residual.default"}
    assert passes < found
    assert ("squared_relu.default" in found) == (mode == "default")
    assert ("relu" in found) == (mode == "max-autotune")


def test_a_block_that_may_be_fused_and_is_not_compiled_keeps_its_kernel(monkeypatch):
    block, _ = block_and_operands()
    asked = []
    monkeypatch.setattr(fused, "take", lambda x: asked.append(x) or False)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    compile_block(block, "max-autotune")
    block.mlp(torch.randn(1, 2, 2, 192))
    assert len(asked) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_tuned_feed_forward_half_computes_the_same():
    """Result and gradients, on the CPU, within rounding: of a block, what this mode compiles otherwise."""

    def outcome(half, x):
        y = half(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *half.parameters()])]

    block, (x, *_) = block_and_operands()
    half, x = block.mlp, x.requires_grad_()
    plain = outcome(half, x)
    torch.compiler.reset()
    compile_block(half, "max-autotune")
    for value, reference in zip(outcome(half, x), plain, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())
