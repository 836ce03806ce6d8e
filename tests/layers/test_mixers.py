"""Token mixers: what they compute, alone and in gspn-dit's block, which tokens they reach, and how they start."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gspn_dit.errors import InputError
from gspn_dit.layers.mixers import (
    MIXERS,
    AttentionMixer,
    GSPNMixer,
    LinearAttentionMixer,
    Mixer,
    Projections,
    WindowAttentionMixer,
)
from gspn_dit.layers.windows import Window
from gspn_dit.models import GSPNDiT, create_model
from gspn_dit.models.macs import count_macs

SIZE = {"width": 32, "depth": 3, "num_groups": 2, "sample_size": 8, "num_classes": 10}
AROUND = {"value.weight", "value.bias", "conv.weight", "conv.bias", "direct", "proj.weight", "proj.bias"}
mixers = pytest.mark.parametrize("mixer", MIXERS)
other_mixers = pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "gspn"])  # test_models.py has it


def small(mixer: str, **overrides) -> GSPNDiT:
    """A small model with this mixer in which nothing is zero any more, in eval mode."""
    torch.manual_seed(0)
    model = create_model("gspn-dit-ti-2", **SIZE, mixer=mixer, **overrides)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    return model.eval()


def inputs(height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 4, height, width), torch.tensor([100.0, 800.0]), torch.tensor([3, 10])


def on_meta(mixer: str) -> GSPNDiT:
    with torch.device("meta"):
        return create_model("gspn-dit-s-2", mixer=mixer)


@other_mixers
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 10), (2, 2)])
def test_any_size_divisible_by_the_patch(mixer, height, width):
    y = small(mixer)(*inputs(height, width))
    assert y.shape == (2, 8, height, width)
    assert y.isfinite().all()


@other_mixers
def test_save_and_load_is_bit_equal(mixer, tmp_path):
    model = small(mixer)
    model.save_pretrained(tmp_path)
    loaded = GSPNDiT.from_pretrained(tmp_path)
    assert loaded.config.mixer == mixer
    assert torch.equal(loaded(*inputs()), model(*inputs()))


def test_a_folder_without_some_of_the_weights_is_refused_by_their_names(tmp_path):
    small("gspn").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del weights["blocks.1.mixer.scale"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 of the GSPNDiT's weights are not in it, such as blocks\.1\.mixer\.scale"):
        GSPNDiT.from_pretrained(tmp_path)


def test_a_folder_with_weights_of_another_shape_is_refused_by_a_name(tmp_path):
    """As those of a version whose s was a number a group."""
    small("gspn").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    weights["blocks.1.mixer.scale"] = torch.ones(4, 2)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"another shape than the GSPNDiT's, such as blocks\.1\.mixer\.scale; .* anew"):
        GSPNDiT.from_pretrained(tmp_path)


def test_a_config_from_before_there_was_a_choice_is_of_scans():
    config = {key: value for key, value in small("conv").config.items() if key != "mixer"}
    assert GSPNDiT.from_config(config).config.mixer == "gspn"


@other_mixers
def test_bf16_autocast_is_close_to_float32_and_trains(mixer):
    model = small(mixer).train()
    exact = model(*inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs())
    assert (rounded.float() - exact).norm() <= 0.05 * exact.norm()
    rounded.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@other_mixers
def test_compiles_as_one_graph(mixer):
    torch._dynamo.reset()
    model = small(mixer)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs()), model(*inputs()), atol=1e-4, rtol=1e-4
    )


@mixers
def test_a_mixer_projects_its_normed_groups_and_the_direct_path(mixer):
    """y = W (mix(v) / its groups' root mean squares + d ⊙ v), v the filtered values."""
    layer = small(mixer).blocks[0].mixer
    x = torch.randn(2, 4, 6, 32)
    value = layer.conv(layer.value(x))
    groups = layer.mix(value).unflatten(-1, (2, 16))
    joined = (groups / groups.square().mean(-1, keepdim=True).sqrt()).flatten(-2) + layer.direct * value
    torch.testing.assert_close(layer(x), layer.proj(joined), atol=1e-3, rtol=1e-3)


def joined_by_steps(layer: GSPNMixer, value: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
    """What other mixers do: norm and skip as operations of their own."""
    return Mixer.join(layer, value, chunk)


@pytest.mark.parametrize("autocast", [False, True])
def test_scans_with_their_norm_and_skip_are_these_one_after_the_other(autocast):
    layer = small("gspn").blocks[0].mixer
    torch.manual_seed(2)
    value, grad = torch.randn(2, 9, 7, 32), torch.randn(2, 9, 7, 32)
    wanted = [p for name, p in layer.named_parameters() if name not in AROUND or name == "direct"]
    results = []
    for join in (layer.join, lambda *inputs: joined_by_steps(layer, *inputs)):
        leaf = value.to(torch.bfloat16 if autocast else torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = join(leaf, 4)
        results.append((y, *torch.autograd.grad(y, [leaf, *wanted], grad.to(y.dtype))))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.float() - theirs.float()).norm() <= (0.015 if autocast else 1e-5) * theirs.float().norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step_keeps_a_map_less_than_with_norm_and_skip_apart(autocast):
    torch.manual_seed(0)
    layer, x = GSPNMixer(32, 2, Projections()), torch.randn(2, 16, 16, 32)

    def kept() -> int:
        memory = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            memory[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        mixed = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
            y = layer(x)  # holds what is kept until it is counted
        assert y.requires_grad
        return sum(memory.values())

    ours = kept()
    layer.join = lambda *inputs: joined_by_steps(layer, *inputs)
    assert ours <= kept() - (2 if autocast else 4) * x.numel()


@mixers
def test_a_mixer_alone_is_the_mixing_of_the_layer_in_the_block(mixer):
    """Without value projection, filter, norm, skip and output projection, on any map of values."""
    layer, alone = small(mixer).blocks[0].mixer, MIXERS[mixer](32, 2)
    weights = layer.state_dict()
    alone.load_state_dict({name: value for name, value in weights.items() if name not in AROUND})
    assert not AROUND & set(alone.state_dict()) and set(weights) > AROUND
    value = torch.randn(2, 5, 7, 32)
    assert torch.equal(alone(value), layer.mix(value))
    if alone.scans:
        assert torch.equal(alone(value, 3), layer.mix(value, 3)) and not torch.equal(alone(value, 3), alone(value))
    else:
        with pytest.raises(InputError, match=rf"chunk=3: a {type(alone).__name__} has no lines; leave it out"):
            alone(value, 3)


@mixers
def test_groups_that_do_not_divide_the_width_are_refused(mixer):
    with pytest.raises(InputError, match="num_groups=3: give a divisor of width=32"):
        MIXERS[mixer](32, 3)


@mixers
def test_a_mixer_mixes_the_values_of_a_convolutional_network(mixer):
    """As the attention of a U-Net, or in a classifier: nothing but maps goes in, and gradients reach all weights."""
    torch.manual_seed(0)
    features, alone = nn.Conv2d(3, 8, 3, stride=2), MIXERS[mixer](8, 1)
    x = features(torch.randn(2, 3, 15, 11)).permute(0, 2, 3, 1)
    nn.functional.cross_entropy((x + alone(x)).mean((1, 2)), torch.tensor([3, 5])).backward()
    parameters = [*features.parameters(), *alone.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


@pytest.mark.parametrize(("mixer", "reach"), [("attention", 20), ("linear", 20), ("window", 8), ("conv", 4)])
def test_attention_reaches_the_whole_map_and_convolution_its_filter(mixer, reach):
    layer = small(mixer).blocks[0].mixer
    x = torch.randn(1, 21, 17, 32, requires_grad=True)
    layer(x)[0, 0, 0].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    rows, columns = (torch.arange(length) <= reach for length in reached.shape)
    assert torch.equal(reached, rows[:, None] & columns)


def test_linear_attention_is_the_quadratic_form_with_relu_products_for_weights():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 20, 8).unbind(0)  # (B, G, N, D)
    weights = query.relu() @ key.relu().transpose(-1, -2)  # (B, G, N, N)
    expected = weights / weights.sum(-1, keepdim=True) @ value
    attend = LinearAttentionMixer(24, 3).attend
    torch.testing.assert_close(attend(query, key, value), expected, atol=1e-4, rtol=1e-4)
    assert attend(-query.abs(), key, value).count_nonzero() == 0  # a query that meets no key: 0, not NaN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_attention_of_a_large_map_keeps_its_sums_in_float32(dtype):
    """40,000 tokens with equal keys give the values' mean, where sums of that many in half precision stall."""
    query, key, value = torch.ones(3, 1, 1, 40_000, 4, dtype=dtype).unbind(0)
    with torch.autocast("cpu", dtype=dtype):
        y = LinearAttentionMixer(4, 1).attend(query * 300, key * 300, value)
    torch.testing.assert_close(y, torch.ones_like(y), atol=1e-3, rtol=0)


def test_linear_attention_in_bfloat16_is_that_in_float32_but_for_rounding():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 500, 8, dtype=torch.bfloat16).unbind(0)
    attend = LinearAttentionMixer(24, 3).attend
    exact, rounded = attend(query.float(), key.float(), value.float()), attend(query, key, value)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.01 * exact.norm()


def window_bounds(place: int, length: int, shifted: bool) -> tuple[int, int]:
    """The first token of the window around one, and the one after its last."""
    shift = 4 if shifted and length > 8 else 0
    first = (place - shift) // 8 * 8 + shift
    return max(first, 0), min(first + 8, length)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(16, 24), (17, 9), (8, 20), (5, 30), (3, 3)])
def test_a_token_sees_its_window_and_nothing_else(size, shifted):
    """Each result is attention among its window's tokens alone, on maps that windows fill and on others."""
    torch.manual_seed(0)
    mixer, plain = WindowAttentionMixer(16, 1, shifted=shifted), AttentionMixer(16, 1)
    plain.load_state_dict(mixer.state_dict())
    value = torch.randn(2, *size, 16)
    y = mixer(value)
    for row in range(size[0]):
        for column in range(size[1]):
            (top, bottom), (left, right) = (window_bounds(*at, shifted) for at in zip((row, column), size, strict=True))
            expected = plain(value[:, top:bottom, left:right])[:, row - top, column - left]
            torch.testing.assert_close(y[:, row, column], expected)


@pytest.mark.parametrize("size", [(16, 24), (17, 9), (3, 3)])
@pytest.mark.parametrize("shifted", [False, True])
def test_what_pads_a_map_of_windows_has_no_gradient_to_give(size, shifted):
    mixer = WindowAttentionMixer(16, 1, shifted=shifted)
    value = torch.randn(1, *size, 16, requires_grad=True)
    mixer(value).square().sum().backward()
    assert value.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_layers_with_shifted_windows_connect_those_of_the_layers_between():
    """A token at the corner of four windows: one layer keeps it in its own, two reach all four."""
    mixers = [block.mixer for block in small("window").blocks]
    assert [mixer.shifted for mixer in mixers] == [False, True, False]
    value = torch.randn(1, 24, 24, 32, requires_grad=True)
    reached = []
    for layers in (mixers[:1], mixers[:2]):
        y = value
        for mixer in layers:
            y = mixer.mix(y)
        (grad,) = torch.autograd.grad(y[0, 8, 8].sum(), value)
        reached.append((grad[0].abs().sum(-1) > 0).nonzero())
    (one, two) = ((places.amin(0).tolist(), places.amax(0).tolist(), len(places)) for places in reached)
    assert one == ([8, 8], [15, 15], 64)
    assert two == ([0, 0], [15, 15], 256)


def test_cost_grows_with_the_tokens_and_for_softmax_attention_with_their_square():
    for mixer in MIXERS:
        model = on_meta(mixer)
        small_map, large_map = (count_macs(model, (side, side)) for side in (32, 128))
        assert (large_map > 30 * small_map) == (mixer == "attention")


def test_mixers_differ_in_their_own_layers_alone():
    """Queries and keys are 2C² + 2C a block, the filter 50C; every other parameter has its name and shape in all."""
    models = {mixer: on_meta(mixer) for mixer in MIXERS}
    shapes = {mixer: {k: v.shape for k, v in model.state_dict().items()} for mixer, model in models.items()}
    own = {"gspn": "head", "attention": "query_key", "linear": "query_key", "window": "query_key", "conv": "wide_conv"}
    numbers = ("mixer.log_rate", "mixer.scale")  # of scans
    shared = [
        {k: v for k, v in shapes[mixer].items() if f".{own[mixer]}." not in k and not k.endswith(numbers)}
        for mixer in MIXERS
    ]
    assert all(other == shared[0] for other in shared)
    rest = sum(shape.numel() for shape in shared[0].values())
    extra = {mixer: model.num_parameters() - rest for mixer, model in models.items()}
    attention = 12 * (2 * 384**2 + 2 * 384)
    scans = 12 * (384 * 24 + (24 + 1) * 6 * 16 + 2 * 4 * 384)
    assert extra == {"gspn": scans, "conv": 12 * 50 * 384} | dict.fromkeys(("attention", "linear", "window"), attention)


def straight_scans(rate: float | None = None) -> GSPNMixer:
    """A mixer alone of two groups whose lines are straight, with λ = 1 everywhere and all four scans added up."""
    mixer = GSPNMixer(8, 2)
    with torch.no_grad():
        mixer.scale.fill_(1)
        mixer.head[1].weight.zero_()
        mixer.head[1].bias.copy_(torch.tensor([-1e4, 1e4, -1e4] * 4 + [1.0] * 4).repeat(2))
        if rate is not None:
            mixer.log_rate.fill_(rate).log_()
    return mixer


def test_channels_of_a_new_mixer_are_filters_of_their_own():
    """What eight channels of one group make of one token are as many independent maps."""
    torch.manual_seed(0)
    mixer = GSPNMixer(8, 1)
    value = torch.zeros(1, 17, 17, 8)
    value[0, 8, 8] = 1
    with torch.no_grad():
        mixer.head[1].weight.zero_()
        maps = mixer(value)[0].flatten(0, 1)
    assert torch.linalg.matrix_rank(maps, rtol=1e-3) == 8
    assert (maps.amin(0) < 0).any() and (maps.amax(0) > 0).any()


@pytest.mark.parametrize("chunk", [None, 4, 5])
def test_scans_decay_at_the_rate_of_their_channel_and_direction(chunk):
    """One token of value 1: every scan hands it straight on, less by f at each line, to the end of its chunk."""
    mixer, (row, column) = straight_scans(), (6, 2)
    torch.manual_seed(0)
    nn.init.normal_(mixer.log_rate, mean=-1.0)
    nn.init.normal_(mixer.scale)
    value = torch.zeros(1, 9, 7, 8)
    value[0, row, column] = 1
    y = mixer(value, chunk)[0]
    (down, up, right, left), scale = torch.exp(-mixer.log_rate.exp()), mixer.scale
    expected = torch.zeros(9, 7, 8)
    for other in range(9):
        if chunk is None or other // chunk == row // chunk:
            decay, s = (down, scale[0]) if other >= row else (up, scale[1])
            expected[other, column] += s * decay ** abs(other - row)
    for other in range(7):
        if chunk is None or other // chunk == column // chunk:
            decay, s = (right, scale[2]) if other >= column else (left, scale[3])
            expected[row, other] += s * decay ** abs(other - column)
    expected[row, column] = scale.sum(0)  # the token itself, in all four directions
    torch.testing.assert_close(y, expected)


def test_lines_of_a_new_mixer_keep_to_their_row():
    """One token of value 1 in the first column: of what the last column receives, its own row has most."""
    torch.manual_seed(0)
    mixer = GSPNMixer(32, 2)
    value = torch.zeros(1, 13, 9, 32)
    value[0, 6, 0] = 1
    mixer.scale.data.fill_(1)
    received = mixer(value)[0, :, -1].detach().unflatten(-1, (2, -1)).mean(-1)  # by no scan but the one along rows
    assert (received > 0).sum(0).tolist() == [13, 13]
    assert (received[6] > received.sum(0) / 3).all()
    assert (received[5:8].sum(0) > 0.7 * received.sum(0)).all()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_lines_of_a_new_mixer_are_straighter_from_group_to_group(groups):
    """Of one token's value, 56 columns on, its own row still has most in the last group; in the first it is spread."""
    torch.manual_seed(0)
    mixer = GSPNMixer(8 * groups, groups)
    mixer.scale.data.fill_(1)
    value = torch.zeros(1, 21, 57, 8 * groups)
    value[0, 10, 0] = 1
    received = mixer(value)[0, :, -1].detach().unflatten(-1, (groups, -1)).mean(-1)  # (21, G)
    own = received[10] / received.sum(0)
    assert own[0] < 0.2 and (own.diff() > 0).all()
    assert groups == 1 or own[-1] > 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_half_life(dtype):
    """A half-life of 64 lines is f = 0.98923. bfloat16 has 0.98828 there, of which a line's 400th is 68% of f's."""
    mixer = straight_scans(rate=math.log(2) / 64)
    mixer.scale.data[1:] = 0  # down alone
    value = torch.zeros(1, 400, 3, 8, dtype=dtype)
    value[:, 0] = 1
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y = mixer(value)
    expected = 2 ** (-torch.arange(400) / 64)
    torch.testing.assert_close(y[0, :, 1].float(), expected[:, None].expand(-1, 8), rtol=0.01, atol=0)
    decay, scale = mixer.to(dtype).channel_factors(torch.float32)
    assert decay.dtype == scale.dtype == torch.float32
    torch.testing.assert_close(
        decay, torch.full_like(decay, 2 ** (-1 / 64)), rtol=5e-4, atol=0
    )  # rates are rounded, not f


def test_half_lives_of_a_new_mixer_are_spread_over_each_groups_channels():
    for groups in (1, 2, 8):  # of 8, 4 channels and one
        half_lives = math.log(2) / GSPNMixer(8, groups).log_rate.detach().exp()
        each = half_lives.view(4, groups % 8 or 1, -1)
        torch.testing.assert_close(each.amin(-1), torch.full_like(each[..., 0], 2))
        torch.testing.assert_close(each.amax(-1), torch.full_like(each[..., 0], 64))


def test_an_unknown_mixer_is_refused_by_name():
    with pytest.raises(InputError, match="mixer='mamba': give one of gspn, attention, linear, window, conv"):
        create_model("gspn-dit-s-2", mixer="mamba")


@pytest.mark.slow
def test_a_mixer_of_shifted_windows_compiles_as_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer, value = GSPNMixer(8, 2), torch.randn(2, 9, 7, 8)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(value, Window(4, shifted=True)), mixer(value, Window(4, shifted=True)))
    assert not torch.allclose(compiled(value, Window(4)), mixer(value, Window(4, shifted=True)))


def test_a_mixer_is_made_on_one_device_whoever_moves_torch_linspace(monkeypatch):
    """transformers 5 has it default to the CPU while it loads, and two loads at once leave it so."""
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **options: linspace(*args, **{"device": "cpu"} | options))
    with torch.device("meta"):
        mixer = GSPNMixer(32, 2)
    assert all(parameter.is_meta for parameter in mixer.parameters())
