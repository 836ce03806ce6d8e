"""The classifiers: published counts and formulas, directions, any size, and what a user of timm asks of a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import gspn_dit
from gspn_dit.commands import ModelsOptions
from gspn_dit.errors import InputError
from gspn_dit.layers.drop_path import drop_path
from gspn_dit.layers.gspn_core import GSPNCore
from gspn_dit.layers.mixers import MIXERS, GSPNMixer
from gspn_dit.layers.norm import ChannelNorm, GlobalResponseNorm
from gspn_dit.models import GSPNClassifier, create_classifier, create_model, list_classifiers
from gspn_dit.models import __main__ as table
from gspn_dit.models.classifier import CLASSIFIER_MIXERS, SIZES, ClassifierBlock, PerChannelMixer
from gspn_dit.models.macs import count_macs

PUBLISHED = ("gspn-t", "gspn-s", "gspn-b")
TINY = {"widths": (16, 32), "depths": (1, 2), "stem_stride": 2, "group_width": 8, "num_classes": 5}

mixers = pytest.mark.parametrize("mixer", CLASSIFIER_MIXERS)
scans = pytest.mark.parametrize("mixer", ["gspn", "gspn-per-channel"])


def tiny(**options) -> GSPNClassifier:
    """A classifier of two stages in which nothing is zero or one any more, in eval mode."""
    torch.manual_seed(0)
    model = GSPNClassifier(**{**TINY, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return model.eval()


def images(batch: int = 2, height: int = 16, width: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def on_meta(name: str, **overrides) -> GSPNClassifier:
    with torch.device("meta"):
        return create_classifier(name, **overrides)


def unfolded_macs(model: GSPNClassifier, side: int) -> int:
    """What the paper's formula Σ_k s_k (u_k h_k + D_k x) costs beyond ours, which sums D over k before any token.

    Of each channel of e, that is 3 of the 4 products of D with the proxy, D_k x in four directions, and four s_k.
    """
    total = 0
    for spec, info in zip(model.specs, model.feature_info, strict=True):
        tokens = (side // info["reduction"]) ** 2
        total += tokens * spec.depth * (3 * spec.width // 2) * (3 * model.config.rank + 8)
    return total


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [("gspn-t", "31.51", "5.30"), ("gspn-s", "50.77", "12.01"), ("gspn-b", "93.06", "15.85")],
)
def test_parameters_and_gmacs_are_those_of_the_published_configurations(name, millions, gmacs):
    """The paper's table has 30 M, 50 M and 89 M in units of 2²⁰, 5.3 and 15.9 GMACs, and for S 9.0: not 12.0."""
    model = on_meta(name)
    assert f"{model.num_parameters() / 1e6:.2f}" == millions
    assert f"{(count_macs(model, (224, 224)) + unfolded_macs(model, 224)) / 1e9:.2f}" == gmacs


def test_the_published_stages_are_global_where_they_are_said_to_be():
    local = {name: [stage.chunk for stage in on_meta(name).stages] for name in PUBLISHED}
    assert local == {"gspn-t": [2, 2, None, None], "gspn-s": [2, 2, 2, None], "gspn-b": [2, 2, None, None]}
    ranks = [on_meta(name).stages[0].blocks[0].mixer.core.proxy.out_features for name in PUBLISHED]
    assert ranks == [8, 16, 8]


@pytest.mark.parametrize("size", ["t", "s", "b"])
@pytest.mark.parametrize("side", [224, 512])
def test_ours_has_at_most_the_parameters_and_macs_of_the_published_size(size, side):
    ours, theirs = on_meta(f"gspn-grouped-{size}"), on_meta(f"gspn-{size}")
    assert ours.num_parameters() <= theirs.num_parameters()
    assert count_macs(ours, (side, side)) <= count_macs(theirs, (side, side))


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_small_one_has_less_than_a_million_parameters_with_any_mixer_but_the_papers(mixer):
    model = on_meta("gspn-grouped-pico", mixer=mixer)
    assert model.num_parameters() < 1_000_000
    assert [info["reduction"] for info in model.feature_info] == [2, 4]  # 28 → 14 → 7


def test_macs_are_those_of_the_layers():
    model = on_meta("gspn-grouped-pico", widths=(32, 64), depths=(1, 1), num_classes=10)

    def block(width):
        rank, groups = width // 16, width // 32
        return 2 * width**2 + 9 * width + width * rank + rank * 16 * groups + 4 * 6 * width + 8 * width**2

    stem = 28 // 2 * (28 // 2) * 9 * (16 + 16 * 32)
    downsampling = 7 * 7 * 9 * 32 * 64
    assert count_macs(model, (28, 28)) == stem + 14 * 14 * block(32) + downsampling + 7 * 7 * block(64) + 64 * 10


def test_a_new_name_is_listed_and_another_kind_of_model_is_told_apart():
    assert list_classifiers() == list(SIZES)
    assert list_classifiers("gspn-grouped-*") == [f"gspn-grouped-{size}" for size in ("t", "s", "b", "pico")]
    assert gspn_dit.create_classifier is create_classifier
    with pytest.raises(InputError, match=r"name='gspn-x': no such model; did you mean .*gspn-"):
        create_classifier("gspn-x")
    with pytest.raises(InputError, match=r"name='gspn-t': is a classifier; .*`create_classifier` makes it"):
        create_model("gspn-t")


def test_the_table_counts_classifiers_at_their_size_and_at_twice(capsys):
    table.main(ModelsOptions(["gspn-dit-ti-2", "gspn-t", "gspn-grouped-pico"]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][0] == "name" and lines[1][0] == "gspn-dit-ti-2" and lines[2][0] == "classifier"
    assert lines[3] == ["gspn-t", "31,510,268", "5.22", "20.89", "224"]
    assert lines[4][0] == "gspn-grouped-pico" and lines[4][-1] == "28"


def test_the_published_mixer_is_its_formula():
    """y = W_out GRN(norm(core(conv₇(W_in x)))) on 1.5C channels, with no activation."""
    mixer = tiny(mixer="gspn-per-channel").stages[0].blocks[0].mixer
    x = torch.randn(2, 5, 6, 16)
    inner = F.conv2d((x @ mixer.proj_in.weight.T).movedim(-1, 1), mixer.conv.weight, padding=3, groups=24)
    y = F.layer_norm(mixer.core(inner.movedim(1, -1), 2), (24,), mixer.norm.weight, mixer.norm.bias)
    size = y.square().sum((1, 2), keepdim=True).sqrt()
    response = mixer.response_norm
    y = y + response.weight * y * size / size.mean(-1, keepdim=True) + response.bias
    torch.testing.assert_close(mixer(x, 2), y @ mixer.proj_out.weight.T, atol=1e-4, rtol=1e-4)
    assert isinstance(mixer, PerChannelMixer) and mixer.conv.weight.shape == (24, 1, 7, 7)
    assert not any(layer.bias is not None for layer in (mixer.proj_in, mixer.conv, mixer.proj_out, mixer.core.gates))


@scans
def test_a_model_is_stem_blocks_downsampling_and_head_in_order(mixer):
    model = tiny(mixer=mixer, chunks=(3, None))

    def normed(norm, x):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)

    def filtered(conv, x):
        return F.conv2d(x.movedim(-1, 1), conv.weight, conv.bias, stride=conv.stride, padding=1).movedim(1, -1)

    def run(block, x, chunk):
        x = x + block.mixer(normed(block.norm1, x), chunk)
        hidden = F.gelu(F.linear(normed(block.norm2, x), block.mlp.fc1.weight, block.mlp.fc1.bias))
        return x + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)

    first, second = model.stages
    x = F.gelu(normed(model.stem.norm1, filtered(model.stem.conv1, images().movedim(1, -1))))
    x = run(first.blocks[0], normed(model.stem.norm2, filtered(model.stem.conv2, x)), 3)
    x = normed(second.downsample.norm, filtered(second.downsample.conv, x))
    x = run(second.blocks[1], run(second.blocks[0], x, None), None)
    features = normed(model.norm, x)
    torch.testing.assert_close(model.forward_features(images()), features.movedim(-1, 1), atol=1e-3, rtol=1e-3)
    logits = F.linear(features.mean((1, 2)), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(images()), logits, atol=1e-3, rtol=1e-3)


def test_the_global_response_norm_begins_as_the_identity_and_is_zero_safe():
    x = torch.randn(2, 3, 4, 8)
    assert torch.equal(GlobalResponseNorm(8)(x), x)
    norm = GlobalResponseNorm(8)
    nn.init.ones_(norm.weight)
    assert norm(torch.zeros(1, 2, 2, 8)).count_nonzero() == 0
    large = torch.full((1, 64, 64, 8), 60.0, dtype=torch.float16)  # the sum of its squares is no float16
    torch.testing.assert_close(norm.half()(large), 2 * large)


# Directions are down, up, right, left. Each move of an image: what it does to a map (…, H, W), which direction becomes
# which, and in which the neighbours before and after change places.
MOVES = {
    "transposed": (lambda x: x.mT, [2, 3, 0, 1], []),
    "upside down": (lambda x: x.flip(-2), [1, 0, 2, 3], [2, 3]),
    "left to right": (lambda x: x.flip(-1), [0, 1, 3, 2], [0, 1]),
}


def moved(model: GSPNClassifier, move: str) -> GSPNClassifier:
    """The model that does to moved images what the model does to images as they were."""
    move_map, becomes, flipped = MOVES[move]

    def directions(part: torch.Tensor, neighbours: bool = False) -> torch.Tensor:
        """Parameters (4, …), or (4, 3, …) with neighbours, in their new order."""
        new = torch.empty_like(part)
        for old, place in enumerate(becomes):
            new[place] = part[old].flip(0) if neighbours and place in flipped else part[old]
        return new

    other = GSPNClassifier(**{key: value for key, value in model.config.items() if not key.startswith("_")}).eval()
    other.load_state_dict(model.state_dict())
    for layer in other.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = move_map(layer.weight.data).contiguous()
        elif isinstance(layer, GSPNCore):
            gates = layer.gates.weight.data
            gates.copy_(directions(gates.unflatten(0, (4, 3, -1)), neighbours=True).flatten(0, 2))
            for part in (layer.lam.weight, layer.out.weight, layer.skip.weight):
                part.data.copy_(directions(part.data.unflatten(0, (4, -1))).flatten(0, 1))
            layer.merge.data.copy_(directions(layer.merge.data))
        elif isinstance(layer, GSPNMixer):
            for part in (layer.log_rate, layer.scale):
                part.data.copy_(directions(part.data))
            for part in (layer.head[1].weight, layer.head[1].bias):
                by_group = part.data.unflatten(0, (layer.num_groups, 16)).transpose(0, 1)  # (16, G, …)
                gates = directions(by_group[:12].unflatten(0, (4, 3)), neighbours=True).flatten(0, 1)
                new = torch.cat([gates, directions(by_group[12:])])
                part.data.copy_(new.transpose(0, 1).flatten(0, 1))
    return other


@mixers
@pytest.mark.parametrize("move", MOVES)
@torch.no_grad()
def test_moving_the_image_and_the_weights_moves_the_features_alone(mixer, move):
    if mixer == "window" and move != "transposed":
        pytest.skip("windows begin at the first row and column")
    model = tiny(mixer=mixer, chunks=(5, 2))
    x = images(2, 29, 37)  # 15 × 19 and 8 × 10 tokens: convolutions of stride 2 are symmetric, chunks of rows are whole
    if move == "left to right":
        x = x.mT.contiguous()
    move_map = MOVES[move][0]
    features, other = model.forward_features(x), moved(model, move).forward_features(move_map(x))
    torch.testing.assert_close(other, move_map(features), atol=2e-4, rtol=2e-4)
    assert not torch.allclose(model.forward_features(move_map(x)), move_map(features), atol=1e-2)


@scans
@pytest.mark.parametrize(("height", "width"), [(24, 24), (21, 46)])
def test_a_global_stage_reaches_the_whole_image_at_any_size_and_a_local_one_does_not(mixer, height, width):
    for chunk, is_global in ((None, True), (2, False)):
        model = tiny(mixer=mixer, widths=(16,), depths=(1,), chunks=chunk)
        for layer in model.modules():  # which would make every token depend on the mean over the map
            if isinstance(layer, GlobalResponseNorm):
                nn.init.zeros_(layer.weight)
        x = images(1, height, width).requires_grad_()
        model.forward_features(x)[..., -1, -1].sum().backward()
        assert (x.grad.abs().sum(1) > 0).all() == is_global


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 50), (7, 5), (1, 1), (64, 17)])
@pytest.mark.parametrize("name", ["gspn-t", "gspn-grouped-t"])
@torch.no_grad()
def test_any_height_and_width(name, height, width):
    model = create_classifier(name, widths=(32, 32, 64, 64), depths=(1, 1, 1, 1), num_classes=3).eval()
    x = images(2, height, width)
    logits, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
    assert logits.shape == (2, 3) and logits.isfinite().all()
    for each, info in zip(maps, model.feature_info, strict=True):
        stride = info["reduction"]
        assert each.shape == (2, info["num_chs"], -(-height // stride), -(-width // stride))
    torch.testing.assert_close(model(x[1:]), logits[1:], atol=1e-4, rtol=1e-4)


def test_stages_mix_kinds_and_windows_alternate():
    model = tiny(mixer=["conv", "window"], chunks=[4, 7])
    assert [spec.mixer for spec in model.specs] == ["conv", "window"]
    assert [stage.chunk for stage in model.stages] == [None, None]  # they have no lines
    assert [block.mixer.shifted for block in model.stages[1].blocks] == [False, True]
    model = tiny(mixer=["gspn-per-channel", "gspn"], chunks=[4, 7])
    assert [type(stage.blocks[0].mixer) for stage in model.stages] == [PerChannelMixer, GSPNMixer]
    assert [stage.chunk for stage in model.stages] == [4, 7]


@mixers
def test_every_parameter_learns(mixer):
    model = GSPNClassifier(**TINY, mixer=mixer, chunks=2)
    F.cross_entropy(model(images(4)), torch.tensor([0, 1, 2, 3])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.count_nonzero() > 0, name


def test_the_map_stays_channels_last_without_copies():
    for mixer in CLASSIFIER_MIXERS:
        model = tiny(mixer=mixer)
        contiguous: list[bool] = []
        for block in (module for module in model.modules() if isinstance(module, ClassifierBlock)):
            block.register_forward_hook(
                lambda block, inputs, y, contiguous=contiguous: contiguous.extend(
                    [inputs[0].is_contiguous(), y.is_contiguous()]
                )
            )
        features = model.forward_features(images(2, 18, 22))
        assert contiguous == [True] * 6
        assert features.is_contiguous(memory_format=torch.channels_last)


def test_branches_are_dropped_whole_and_the_more_the_deeper():
    model = create_classifier("gspn-grouped-pico", drop_path_rate=0.3)
    chances = [block.drop_chance for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(torch.tensor(chances), torch.linspace(0, 0.3, 6))
    assert [on_meta(name).config.drop_path_rate for name in PUBLISHED] == [0.2, 0.4, 0.5]
    torch.manual_seed(0)
    branch = torch.ones(2000, 1, 1, 3)
    dropped = drop_path(branch, 0.25, training=True)
    values = dropped.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 4 / 3]))
    assert torch.equal(dropped, dropped[..., :1].expand_as(dropped))
    assert 0.22 < (dropped[:, 0, 0, 0] == 0).float().mean() < 0.28
    assert drop_path(branch, 0.25, training=False) is branch


def test_drop_path_is_heeded_in_training_alone_and_in_both_halves_of_a_block():
    torch.manual_seed(0)
    model = tiny(drop_path_rate=0.5)
    block, x = model.stages[1].blocks[-1], torch.randn(64, 3, 3, 32)
    assert torch.equal(block(x), block(x))
    half = block.mixer(block.norm1(x))
    outcomes = [x, x + 2 * half]
    outcomes += [each + 2 * block.mlp(block.norm2(each)) for each in outcomes]
    y = block.train()(x)
    matches = torch.stack([(y - each).abs().amax((1, 2, 3)) < 1e-3 for each in outcomes])
    assert (matches.sum(0) == 1).all() and (matches.sum(1) > 4).all()


def test_dropout_is_before_the_last_layer():
    model = tiny(drop_rate=0.5).train()
    torch.manual_seed(0)
    features = torch.ones(2000, 32, 1, 1)
    kept = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 2.0]))
    assert 0.45 < (kept == 0).float().mean() < 0.55
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), features[..., 0, 0])


@scans
def test_gradient_checkpointing_changes_no_gradient(mixer):
    model = tiny(mixer=mixer, drop_path_rate=0.5, drop_rate=0.2).train()
    calls = []
    model.stages[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointing in (False, True, False):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(2)
        model(images(4)).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(calls) == 4  # once each, and once recomputed
    for plain, recomputed, again in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
        torch.testing.assert_close(again, plain)


def test_grad_checkpointing_takes_diffusers_switch_as_well():
    model = tiny()
    model.enable_gradient_checkpointing(checkpoint)
    assert model.gradient_checkpointing
    model.set_grad_checkpointing(False)
    assert not model.gradient_checkpointing


@mixers
def test_bf16_autocast_is_close_to_float32_and_trains(mixer):
    torch.manual_seed(0)
    model = GSPNClassifier(**TINY, mixer=mixer, chunks=(2, None)).eval()
    exact = model(images(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(images(4))
    rounded.float().square().mean().backward()
    assert (rounded.float() - exact).norm() <= 0.1 * exact.norm()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.skipif(torch.__version__ < "2.11", reason="fake CUDA tensors ask torch 2.8 for a driver")
@pytest.mark.parametrize("name", ["gspn-t", "gspn-grouped-t"])
def test_cudas_autocast_leaves_the_map_in_bfloat16(name):
    """There, not on a CPU, norms become float32, and with them every map up to the next product."""
    with FakeTensorMode(), torch.device("cuda"):
        model = create_classifier(name, depths=(1, 1, 1, 1), num_classes=0)
        maps = []
        for module in model.stages.modules():
            if not isinstance(module, nn.ModuleList):
                module.register_forward_hook(lambda module, inputs, y: maps.extend([inputs[0].dtype, y.dtype]))
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        try:
            model(torch.zeros(2, 3, 64, 64))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    assert len(maps) > 50 and set(maps) == {torch.bfloat16}


@pytest.mark.slow
@scans
def test_compiles_as_one_graph(mixer):
    torch._dynamo.reset()
    model = tiny(mixer=mixer, chunks=(2, None), drop_rate=0.1).train()
    model.drop_rate = 0.0
    eager = model(images())
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images()), eager)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(images()), eager)


def test_forward_is_head_of_features_and_pre_logits_are_what_the_last_layer_is_given():
    model, x = tiny(), images()
    features = model.forward_features(x)
    assert features.shape == (2, 32, 4, 4)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    assert model.num_features == model.head_hidden_size == 32


def test_the_classifier_is_replaced_removed_and_left_unpooled():
    model, x = GSPNClassifier(**{**TINY, "num_classes": 1000}).eval(), images()
    body = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("head")}
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == model.config.num_classes == 7
    assert GSPNClassifier.from_config(model.config).num_classes == 7
    assert model.head.weight.std() < 0.05 and model.head.bias.count_nonzero() == 0
    model.reset_classifier(7, "")
    assert model(x).shape == (2, 7, 4, 4)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), model.forward_features(x).mean((2, 3)))
    assert tiny(num_classes=0)(x).shape == (2, 32) and isinstance(model.get_classifier(), nn.Identity)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in body.items())


def test_intermediates_are_the_maps_of_stages():
    model, x = tiny(), images()
    maps = []
    for stage in model.stages:
        stage.register_forward_hook(lambda stage, inputs, y: maps.append(y))
    last, given = model.forward_intermediates(x)
    assert all(torch.equal(one.permute(0, 2, 3, 1), other) for one, other in zip(given, maps, strict=True))
    torch.testing.assert_close(last, model.forward_features(x))
    (normed,) = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed, last)
    (first,) = model.forward_intermediates(x, [-2], output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(first, given[0].permute(0, 2, 3, 1))
    maps.clear()
    stopped, _ = model.forward_intermediates(x, [0], stop_early=True)
    assert len(maps) == 1 and torch.equal(stopped, given[0])
    with pytest.raises(InputError, match="output_fmt='NLC': give NCHW or NHWC"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_features_only_gives_the_maps_at_strides_4_8_16_32_and_trains_all_that_is_left():
    options = {"widths": (32, 32, 64, 96), "depths": (1, 1, 1, 1)}
    model = create_classifier("gspn-grouped-t", features_only=True, **options)
    maps = model(images(2, 64, 96))
    assert [tuple(each.shape) for each in maps] == [(2, 32, 16, 24), (2, 32, 8, 12), (2, 64, 4, 6), (2, 96, 2, 3)]
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([32, 32, 64, 96], [4, 8, 16, 32])
    sum(each.square().mean() for each in maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    some = create_classifier("gspn-grouped-t", features_only=True, out_indices=(2, -3), **options)
    assert some.feature_info.module_name() == ["stages.1", "stages.2"] and len(some.model.stages) == 3
    assert [each.shape[1] for each in some(images(1, 32, 32))] == [32, 64]
    full = create_classifier("gspn-grouped-t", **options).eval()
    some.model.load_state_dict(full.state_dict(), strict=False)
    expected = full.forward_intermediates(images(1, 32, 32), [1, 2], intermediates_only=True)
    for one, other in zip(some.eval()(images(1, 32, 32)), expected, strict=True):
        assert torch.equal(one, other)


def test_no_decay_is_asked_for_what_multiplies_no_input():
    model = tiny(mixer=["gspn", "gspn-per-channel"])
    names = {name.removeprefix("stages.") for name in model.no_weight_decay()}
    expected = {"0.blocks.0.mixer.log_rate", "0.blocks.0.mixer.scale"}
    assert names == expected | {f"1.blocks.{i}.mixer.core.merge" for i in range(2)}
    assert model.no_weight_decay() <= set(model.state_dict())


def test_how_images_are_prepared_fits_their_channels_and_is_saved_with_the_model(tmp_path):
    cfg = create_classifier("gspn-grouped-pico").pretrained_cfg
    assert cfg["input_size"] == (1, 28, 28) and not cfg["fixed_input_size"] and cfg["num_classes"] == 10
    gray = on_meta("gspn-grouped-t", in_chans=1).default_cfg
    assert gray["input_size"] == (1, 224, 224) and gray["mean"] == (pytest.approx(0.449, abs=1e-3),)
    assert on_meta("gspn-grouped-pico", in_chans=3).default_cfg["std"] == (0.5, 0.5, 0.5)
    model = tiny(pretrained_cfg={"crop_pct": 0.9, "label_names": list("abcde")})
    for key, module in (("first_conv", nn.Conv2d), ("classifier", nn.Linear)):
        assert isinstance(model.get_submodule(model.default_cfg[key]), module)
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    model.save_pretrained(tmp_path)
    loaded = GSPNClassifier.from_pretrained(tmp_path)
    assert loaded.pretrained_cfg == model.pretrained_cfg == loaded.default_cfg
    assert loaded.pretrained_cfg["label_names"] == list("abcde")


@scans
def test_save_and_load_is_bit_equal(mixer, tmp_path):
    model = tiny(mixer=["attention", mixer], chunks=[None, 3], drop_path_rate=0.2)
    model.reset_classifier(9)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = GSPNClassifier.from_pretrained(tmp_path)
    assert not loaded.training and loaded.specs == model.specs
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    torch.testing.assert_close(loaded(images(1, 20, 12)), model(images(1, 20, 12)))


def test_a_folder_of_something_else_is_refused(tmp_path):
    for folder, reason in ((tmp_path / "none", "is no folder"), (tmp_path, "has no config.json that can be read")):
        with pytest.raises(InputError, match=f"^model='{folder}': {reason}; wanted the folder of a saved classifier"):
            GSPNClassifier.from_pretrained(folder)
    other, saved = tmp_path / "other", tmp_path / "saved"
    create_model("gspn-dit-ti-2", width=16, depth=2, num_groups=1).save_pretrained(other)
    with pytest.raises(InputError, match="other': holds a model of the kind GSPNDiT; wanted"):
        GSPNClassifier.from_pretrained(other)
    tiny().save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"depths": [2, 2]}))
    with pytest.raises(InputError, match=r"of the GSPNClassifier's weights are not in it, such as stages.0.blocks.1"):
        GSPNClassifier.from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps(config | {"num_classes": 6}))
    with pytest.raises(InputError, match="weights of another shape than the GSPNClassifier's, such as head"):
        GSPNClassifier.from_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"has no config\.json that can be read"):
        GSPNClassifier.from_pretrained(saved)
    shutil.copy(other / "config.json", saved / "config.json")
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="its weights cannot be read"):
        GSPNClassifier.from_pretrained(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, r"widths=\(\): give a list"),
        ({"widths": 96}, "widths=96: give a list"),
        ({"widths": (16, "b")}, "widths='b': give a whole number from 1"),
        ({"depths": 2}, "depths=2: give one for each of the 2 stages"),
        ({"depths": (1, 2, 3)}, r"depths=\(1, 2, 3\): give one for each of the 2 stages"),
        ({"depths": (1, 0)}, "depths=0: give a whole number from 1"),
        ({"mixer": "mamba"}, "mixer='mamba': give one of gspn, attention, .*, gspn-per-channel"),
        ({"mixer": ["gspn"]}, r"mixer=\['gspn'\]: give one for each"),
        ({"chunks": 0}, "chunks=0: give a whole number from 1"),
        ({"chunks": (None, "all")}, "chunks='all'"),
        ({"group_width": 5}, "group_width=5: give a divisor of the width 16"),
        ({"group_width": 0}, "group_width=0"),
        ({"rank": 0}, "rank=0"),
        ({"conv_kernel": 4}, "conv_kernel=4: give an odd number"),
        ({"mlp_ratio": -1}, "mlp_ratio=-1"),
        ({"stem_stride": 3}, "stem_stride=3: give 4, 2 or 1"),
        ({"drop_path_rate": 1}, r"drop_path_rate=1: give a chance in \[0, 1\)"),
        ({"drop_rate": "half"}, "drop_rate='half'"),
        ({"num_classes": -1}, "num_classes=-1: give a whole number from 0"),
        ({"in_chans": 0}, "in_chans=0"),
        ({"global_pool": "max"}, "global_pool='max': give avg"),
        ({"patch_size": 2}, "patch_size=2: gspn-grouped-pico has no such option; choose from widths, depths"),
        ({"out_indices": (1,)}, r"out_indices=\(1,\): belongs to features_only=True"),
        (
            {"features_only": True, "out_indices": (2,)},
            r"out_indices=\(2,\): give a list of indices of the stages 0 to 1",
        ),
        ({"features_only": True, "out_indices": 3}, "out_indices=3"),
        ({"features_only": True, "out_indices": "all"}, "out_indices='all'"),
    ],
)
def test_what_a_classifier_cannot_take_is_refused_by_name(options, message):
    with torch.device("meta"), pytest.raises(InputError, match=message):
        create_classifier("gspn-grouped-pico", **{**TINY, **options})


def test_misshapen_images_are_refused():
    model = tiny()
    for shape in ((2, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(InputError, match=r"^images: shape \(.*\); wanted \(B, 3, height, width\)"):
            model(torch.zeros(shape))


def test_a_channel_norm_is_layer_norm_in_its_inputs_dtype():
    norm = ChannelNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 3, 8)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,), norm.weight, norm.bias))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
