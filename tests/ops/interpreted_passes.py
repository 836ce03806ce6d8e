"""The Triton kernels of `gspn_dit.ops.passes`, interpreted on the CPU; test_passes.py sets TRITON_INTERPRET.

Each function of `gspn_dit.layers.fused` runs as on a GPU, through torch's operators, and is compared with its own
composition in float64: results and gradients. Programs run one after the other here, so that what they compute is the
same twice says nothing: test_passes.py asks that of a GPU.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import gspn_dit.layers.fused as fused
from gspn_dit.models import create_model
from gspn_dit.ops.passes import activation, convolution, norm, operators

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
MAPS = [(2, 4, 4, 32), (1, 3, 5, 20), (3, 1, 1, 7), (2, 5, 3, 33), (1, 2, 2, 300)]


def in_every_dtype(shapes, of_rounded):
    """Every shape in float32; one of them in every other dtype, which differs where numbers are read and written."""
    return [(shape, torch.float32) for shape in shapes] + [
        (of_rounded, dtype) for dtype in TOLERANCE if dtype != torch.float32
    ]


@contextmanager
def kernels():
    """`fused` calls the kernels, though the tensors are the CPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "take", lambda x, *vectors: True)
        for module in (activation, convolution, norm):
            patch.setattr(module, "wrap_triton", lambda kernel: kernel)
        yield


def outcome(function, *operands: Tensor | None) -> list[Tensor]:
    """Results, and gradients of the operands for the same random gradients of the results."""
    operands = [operand if operand is None else operand.detach().requires_grad_() for operand in operands]
    results = function(*operands)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    wanted = [operand for operand in operands if operand is not None]
    return [*results, *torch.autograd.grad(results, wanted, grads, materialize_grads=True)]


def compare(function, *operands: Tensor | None) -> None:
    """Kernels against the composition in float64, by the largest of each tensor's numbers."""
    exact = outcome(function, *(operand if operand is None else operand.double() for operand in operands))
    with kernels():
        got = outcome(function, *operands)
    coarsest = max((o.dtype for o in operands if o is not None), key=TOLERANCE.__getitem__)
    for value, reference in zip(got, exact, strict=True):
        assert value.shape == reference.shape
        error = (value.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-3)
        assert error < TOLERANCE[coarsest], (value.dtype, value.shape, error)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def modulation(batch: int, channels: int, vectors: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A pass's part of a modulation, (B, 1, 1, n, C), as a block has it: not contiguous."""
    return random(batch, 1, 1, 6, channels, dtype=dtype)[..., 1 : 1 + vectors, :]


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), in_every_dtype(MAPS, (2, 5, 3, 33)))
def test_norms_and_residuals(shape, dtype, with_offset):
    x, branch = random(*shape, dtype=dtype), random(*shape, dtype=dtype).flip(0, 1) + 1
    for function, *maps, vectors in (
        (fused.modulated_norm, x, 2),
        (fused.gated_residual, x, branch, 1),
        (fused.gated_residual_norm, x, branch, 3),
    ):
        given = modulation(shape[0], shape[-1], vectors, dtype)
        compare(function, *maps, given, given.flip(0, -1) if with_offset else None)


def test_many_tokens_are_several_slices_of_several_tiles(monkeypatch):
    monkeypatch.setattr(norm, "FORWARD_TILE", 64)
    monkeypatch.setattr(norm, "BACKWARD_TILE", 64)
    test_norms_and_residuals((2, 3, 7, 17), torch.float32, True)


def test_a_modulation_may_be_expanded_and_of_another_dtype():
    x, branch = random(3, 4, 4, 24, dtype=torch.bfloat16), random(3, 4, 4, 24, dtype=torch.bfloat16)
    one, offset = modulation(1, 24, 3), modulation(3, 24, 3, torch.bfloat16)
    given = one.expand(3, 1, 1, 3, 24)
    compare(fused.modulated_norm, x, given[..., :2, :])
    compare(fused.modulated_norm, x, offset[..., :2, :], one[..., :2, :])
    compare(fused.gated_residual_norm, x.float(), branch, given, offset)
    with kernels():
        assert fused.modulated_norm(x, given[..., :2, :]).dtype == torch.float32
        assert fused.modulated_norm(x, offset[..., :2, :], one[..., :2, :]).dtype == torch.float32
        assert fused.gated_residual(x, branch, offset[..., :1, :]).dtype == torch.bfloat16
        for each, every in zip(*(fused.gated_residual_norm(x, branch, some) for some in (one, given)), strict=True):
            assert torch.equal(each, every)


def test_an_offset_is_added_before_anything_is_rounded():
    """A bfloat16 gate of 256 + 1, which its type has no number for, times a branch of 1."""
    x, ones = torch.zeros(1, 2, 2, 8, dtype=torch.bfloat16), torch.ones(1, 2, 2, 8)
    gate, offset = (torch.full((1, 1, 1, 1, 8), value, dtype=torch.bfloat16) for value in (256, 1))
    with kernels():
        assert (fused.gated_residual(x, ones, gate, offset) == 257).all()


def test_vectors_of_an_image_may_lie_anywhere():
    x, branch = random(2, 3, 3, 16), random(2, 3, 3, 16).flip(0)
    given = random(2, 1, 1, 16, 3).transpose(-1, -2)
    compare(fused.gated_residual_norm, x, branch, given, random(3, 2, 1, 1, 16).permute(1, 2, 3, 0, 4))


def test_a_permuted_map():
    x = random(2, 16, 5, 3).permute(0, 2, 3, 1)
    compare(fused.gated_residual_norm, x, random(2, 5, 3, 16), modulation(2, 16, 3))
    compare(fused.depthwise_conv, x, random(16, 1, 3, 3), random(16))
    compare(fused.squared_relu, x)


def test_either_result_may_go_unused():
    x, branch, given = random(2, 4, 4, 16), random(2, 4, 4, 16).flip(0), modulation(2, 16, 3)
    for use in (0, 1):
        compare(lambda *operands, use=use: fused.gated_residual_norm(*operands)[use], x, branch, given, given.flip(0))


@pytest.mark.parametrize(("shape", "dtype"), in_every_dtype([(2, 4, 4, 32), (5,), (3, 1025)], (3, 1025)))
def test_squared_relu(shape, dtype):
    compare(fused.squared_relu, random(*shape, dtype=dtype))


def test_nan_shows():
    x = random(1, 2, 2, 16)
    x[0, 0, 0, 3] = torch.nan
    with kernels():
        assert fused.squared_relu(x).isnan().sum() == 1
        assert fused.modulated_norm(x, modulation(1, 16, 2)).isnan().sum() == 16


@pytest.mark.parametrize(
    ("shape", "dtype"),
    in_every_dtype([(2, 3, 4, 32), (1, 3, 5, 20), (3, 1, 1, 7), (2, 1, 9, 16), (2, 5, 1, 16)], (1, 3, 5, 20)),
)
def test_depthwise_conv(shape, dtype):
    channels = shape[-1]
    weight = random(channels, 1, 3, 3, dtype=dtype)
    compare(fused.depthwise_conv, random(*shape, dtype=dtype), weight, random(channels, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 9, 3, 65), (1, 2, 20, 40)])  # several rows, columns and channels of tiles
def test_depthwise_conv_of_several_tiles(shape):
    test_depthwise_conv(shape, torch.float32)


def test_depthwise_conv_without_bias_and_with_weights_of_another_dtype():
    compare(fused.depthwise_conv, random(2, 2, 3, 24), random(24, 1, 3, 3), None)
    compare(fused.depthwise_conv, random(2, 2, 3, 24, dtype=torch.bfloat16), random(24, 1, 3, 3), random(24))


@pytest.mark.parametrize(
    ("name", "sizes"), [("gspn-dit-ti-2", {"num_groups": 2, "global_layers": 1}), ("dit-ti-2", {"num_heads": 2})]
)
def test_a_model_and_its_gradients(name, sizes):
    torch.manual_seed(0)
    model = create_model(name, depth=2, width=32, num_classes=3, sample_size=6, **sizes)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    operands = torch.randn(2, 4, 6, 6), torch.tensor([10.0, 700.0]), torch.tensor([0, 2])

    def gradients(model):
        prediction = model(*operands)
        prediction.square().sum().backward()
        return {"prediction": prediction.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients(copy.deepcopy(model))
    with kernels():
        one_pass = gradients(model)
    for key, value in one_pass.items():
        torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4 * plain[key].abs().max().item(), msg=key)


def test_operators_are_sound():
    """Schemas, fake kernels and autograd registrations, as torch checks them."""
    x, branch = random(2, 3, 3, 16).requires_grad_(), random(2, 3, 3, 16).requires_grad_()
    one, two, three = (modulation(2, 16, vectors)[:, 0, 0].requires_grad_() for vectors in (1, 2, 3))
    checks = ("test_schema", "test_autograd_registration")
    with kernels():
        for operator, operands in {
            operators.modulated_norm: (x, two),
            operators.gated_residual: (x, branch, one),
            operators.gated_residual_norm: (x, branch, three),
            operators.squared_relu: (x,),
            operators.depthwise_conv: (x, random(16, 1, 3, 3).requires_grad_(), random(16).requires_grad_()),
        }.items():
            torch.library.opcheck(operator, operands, test_utils=checks)
        for operator, operands in {
            operators.modulated_norm: (x, two, two.detach().clone().requires_grad_()),
            operators.gated_residual: (x, branch, one, one.detach().clone().requires_grad_()),
            operators.gated_residual_norm: (x, branch, three, three.detach().clone().requires_grad_()),
        }.items():
            torch.library.opcheck(operator, operands, test_utils=checks)
