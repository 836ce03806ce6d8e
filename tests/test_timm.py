"""The classifiers as timm makes, sorts, feeds and loads them."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from gspn_dit.models import GSPNClassifier, create_classifier, list_classifiers
from gspn_dit.models.classifier import PREPARATION
from gspn_dit.timm import timm_name

SMALL = {"widths": (32, 32, 64, 96), "depths": (1, 2, 1, 1), "num_classes": 7}


def small(name: str = "gspn_tiny", **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options}).eval()


def images(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_timm_lists_every_name_in_its_own_way():
    assert [timm_name(name) for name in ("gspn-t", "gspn-s", "gspn-b")] == ["gspn_tiny", "gspn_small", "gspn_base"]
    assert timm_name("gspn-grouped-pico") == "gspn_grouped_pico"
    assert set(timm.list_models("gspn_*")) == {timm_name(name) for name in list_classifiers()}
    assert timm.list_models("gspn_*", pretrained=True) == []


@pytest.mark.parametrize("name", list_classifiers())
def test_timms_model_is_ours(name):
    with torch.device("meta"):
        ours, theirs = create_classifier(name), timm.create_model(timm_name(name))
    assert isinstance(theirs, GSPNClassifier) and theirs.specs == ours.specs
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for key in set(ours.config) - {"_use_default_values", "pretrained_cfg"}:
        assert theirs.config[key] == ours.config[key], key
    for key in PREPARATION:
        assert theirs.default_cfg[key] == ours.default_cfg[key], key


def test_options_of_timm_reach_the_model():
    model = small(in_chans=1, drop_path_rate=0.4, drop_rate=0.1, global_pool="")
    assert model.stages[3].blocks[0].drop_chance == pytest.approx(0.4)
    assert (model.drop_rate, model.in_chans, model.num_classes) == (0.1, 1, 7)
    assert model(torch.randn(1, 1, 33, 64)).shape == (1, 7, 2, 2)
    assert small(drop_path_rate=None).config.drop_path_rate == 0.2  # as timm's scripts ask where nobody did
    assert small(num_classes=0)(images()).shape == (2, 96)


@pytest.mark.parametrize("name", ["gspn_tiny", "gspn_grouped_tiny"])
def test_features_only_is_maps_at_strides_4_8_16_32(name):
    model = small(name, features_only=True)
    assert model.feature_info.channels() == [32, 32, 64, 96]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(each.shape[1:]) for each in model(images())] == [(32, 16, 24), (32, 8, 12), (64, 4, 6), (96, 2, 3)]
    some = small(name, features_only=True, out_indices=(1, -2))
    assert some.feature_info.reduction() == [8, 16]
    expected = small(name).forward_intermediates(images(), [1, 2], intermediates_only=True)
    for one, other in zip(some(images()), expected, strict=True):
        assert torch.equal(one, other)


def test_timm_feeds_images_of_the_right_size():
    config = resolve_data_config({}, model=small())
    assert (config["input_size"], config["crop_pct"]) == ((3, 224, 224), 0.875)
    assert config["interpolation"] == "bicubic" and config["mean"] == (0.485, 0.456, 0.406)
    pico = timm.create_model("gspn_grouped_pico")
    config = resolve_data_config({}, model=pico)
    assert pico(torch.zeros(1, *config["input_size"])).shape == (1, 10)


def test_layers_are_sorted_from_stem_to_head():
    model = small("gspn_grouped_tiny")
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == {name for name, _ in model.named_parameters()}
    blocks = [
        layers[f"stages.{stage}.blocks.{block}.norm1.weight"] for stage, block in ((0, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert layers["stem.conv1.weight"] == layers["stem.norm2.bias"] == 0
    assert blocks == sorted(set(blocks)) and blocks[0] > 0
    assert layers["stages.0.blocks.0.norm1.weight"] < layers["stages.1.downsample.conv.weight"] <= blocks[1]
    assert layers["norm.weight"] == layers["stages.3.blocks.0.norm1.weight"] == layers["head.weight"] - 1
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert [coarse[f"stages.{stage}.blocks.0.mlp.fc1.weight"] for stage in range(4)] == [1, 2, 3, 4]


def test_layer_decay_and_weight_decay_take_the_models_word():
    model = small("gspn_grouped_tiny")
    names = {parameter: name for name, parameter in model.named_parameters()}
    without, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert {names[each] for each in without["params"]} >= model.no_weight_decay() != set()
    assert decayed["weight_decay"] == 0.05 and all(each.ndim > 1 for each in decayed["params"])
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {names[each]: group["lr_scale"] for group in groups for each in group["params"]}
    assert scale["head.weight"] == 1 and scale["stem.conv1.weight"] == min(scale.values()) < 0.05


def test_weights_go_to_and_from_timm(tmp_path):
    model = small("gspn_grouped_tiny")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    by_path = timm.create_model("gspn_grouped_tiny", checkpoint_path=str(weights), **SMALL).eval()
    loaded = GSPNClassifier.from_pretrained(tmp_path)
    finetuned = timm.create_model(  # for other classes: timm drops the head's weights
        "gspn_grouped_tiny",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(weights), "num_classes": 7},
        **{**SMALL, "num_classes": 3},
    ).eval()
    x = images()
    torch.testing.assert_close(by_path(x), model(x))
    torch.testing.assert_close(loaded(x), model(x))
    torch.testing.assert_close(finetuned.forward_features(x), model.forward_features(x))
    assert finetuned(x).shape == (2, 3)


def test_weights_for_colours_are_loaded_into_a_model_for_grey(tmp_path):
    model = small("gspn_grouped_tiny")
    model.save_pretrained(tmp_path)
    file = str(tmp_path / "diffusion_pytorch_model.safetensors")
    overlay = {"file": file, "num_classes": 7}
    grey = timm.create_model("gspn_grouped_tiny", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, **SMALL)
    x = images()[:, :1]
    torch.testing.assert_close(grey.eval()(x), model(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
