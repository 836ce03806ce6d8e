"""The three families: published counts, names and formulas, and what every model promises its users."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gspn_dit
from gspn_dit.commands import ModelsOptions
from gspn_dit.errors import InputError
from gspn_dit.layers import fused
from gspn_dit.layers.embeddings import TimestepEmbedding, sincos_positions
from gspn_dit.layers.feed_forward import SquaredReLU
from gspn_dit.layers.mixers import GSPNMixer
from gspn_dit.models import DiT, GSPNDiT, create_model, list_models, register_model, registry
from gspn_dit.models import __main__ as table
from gspn_dit.models.dit import Attention
from gspn_dit.models.gspn import GSPNBlock
from gspn_dit.models.latent_model import LatentModel
from gspn_dit.models.macs import count_macs

SMALL = {
    "dit-ti-2": {"width": 32, "depth": 3, "num_heads": 2},
    "gspn-ti-2": {"width": 32, "depth": 5},
    "gspn-dit-ti-2": {"width": 32, "depth": 3, "num_groups": 2},
}

families = pytest.mark.parametrize("name", SMALL)


def small(name: str, **overrides) -> nn.Module:
    """A small model of a family in which nothing is zero any more, in eval mode."""
    torch.manual_seed(0)
    model = create_model(name, **{**SMALL[name], "sample_size": 8, "num_classes": 10, **overrides})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return model.eval()


def inputs(batch: int = 2, height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, height, width, generator=random)
    return latents, torch.rand(batch, generator=random) * 1000, torch.randint(0, 11, (batch,), generator=random)


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(name)


@pytest.mark.parametrize(("name", "std"), [("dit-ti-2", 0.02), ("gspn-ti-2", 0.02), ("gspn-dit-ti-2", 1.0)])
def test_labels_start_as_published_but_in_gspn_dit_at_unit_scale(name, std):
    torch.manual_seed(0)
    labels = create_model(name, num_classes=100).y_embedder.embedding_table.weight
    assert labels.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("name", "parameters", "trainable"),
    [
        ("dit-s-2", 32_963_360, 32_865_056),
        ("dit-b-2", 130_512_416, 130_315_808),
        ("dit-l-2", 458_102_816, 457_840_672),
        ("dit-xl-2", 675_129_632, 674_834_720),
        ("gspn-s-2", 20_151_812, 20_151_812),
        ("gspn-b-2", 144_016_356, 144_016_356),
        ("gspn-l-2", 465_230_660, 465_230_660),
        ("gspn-xl-2", 723_513_260, 723_513_260),
    ],
)
def test_parameters_are_as_published(name, parameters, trainable):
    model = on_meta(name)
    assert (model.num_parameters(), model.num_parameters(only_trainable=True)) == (parameters, trainable)


@pytest.mark.parametrize("name", list_models("gspn-dit-*"))
def test_gspn_dit_has_at_most_65_6_percent_of_the_parameters_of_dit(name):
    assert on_meta(name).num_parameters() <= 0.656 * on_meta(name.removeprefix("gspn-")).num_parameters()


@pytest.mark.parametrize(("size", "gmacs"), [("s", "6.1"), ("b", "23.0"), ("l", "80.7"), ("xl", "118.6")])
def test_dit_gmacs_are_as_published(size, gmacs):
    assert f"{count_macs(on_meta(f'dit-{size}-2'), (32, 32)) / 1e9:.1f}" == gmacs


def test_gspn_dit_macs_are_those_of_its_layers_and_linear_in_pixels():
    model = on_meta("gspn-dit-s-2")
    width, depth, rank, groups = 384, 12, 384 // 16, 6
    mixer = 2 * width**2 + 9 * width + width * rank + rank * 16 * groups + 6 * 4 * width
    a_token = 4 * 4 * width + depth * (mixer + 6 * width**2) + width * 4 * 8
    modulation = 6 * width**2 + width * (width // 4) + depth * (width // 4) * 6 * width
    a_sample = 256 * width + width**2 + modulation
    for latent_size in ((32, 32), (64, 64), (16, 48)):
        tokens = latent_size[0] * latent_size[1] // 4
        assert count_macs(model, latent_size) == tokens * a_token + a_sample


def test_dit_state_dict_has_the_names_of_the_published_checkpoints():
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    layers = [
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        *(f"blocks.0.{layer}" for layer in block),
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    expected |= {"pos_embed", "y_embedder.embedding_table.weight"}
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in DiT(depth=1).state_dict().items()}
    assert set(shapes) == expected
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["x_embedder.proj.weight"] == (1152, 4, 2, 2)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)


def test_attention_is_softmax_of_scaled_products_in_the_order_of_the_published_weights():
    torch.manual_seed(0)
    attention = Attention(12, 3)
    x = torch.randn(2, 3, 4, 12)
    q, k, v = (x.flatten(1, 2) @ attention.qkv.weight.T).split(12, dim=-1)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)).softmax(dim=-1)
        heads.append(weights @ v[..., part])
    expected = torch.cat(heads, dim=-1) @ attention.proj.weight.T
    torch.testing.assert_close(attention(x).flatten(1, 2), expected)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (3, 5), (1, 7)])
def test_positions_are_sines_and_cosines_of_column_then_row(height, width):
    channels = 24
    table = sincos_positions(height, width, channels)[0]
    frequencies = [10_000 ** (-i / (channels // 4)) for i in range(channels // 4)]
    for row in range(height):
        for column in range(width):
            angles = [[place * f for f in frequencies] for place in (column, row)]
            closed = [wave(angle) for axis in angles for wave in (math.sin, math.cos) for angle in axis]
            torch.testing.assert_close(table[row, column], torch.tensor(closed), atol=1e-5, rtol=0)


def test_times_are_cosines_then_sines_at_128_frequencies():
    embedding, waves = TimestepEmbedding(16), []
    embedding.mlp.register_forward_pre_hook(lambda module, inputs: waves.append(inputs[0]))
    times = [0.0, 1.0, 123.4, 999.0]
    embedding(torch.tensor(times))
    angles = [[t * 10_000 ** (-i / 128) for i in range(128)] for t in times]
    closed = [[wave(angle) for wave in (math.cos, math.sin) for angle in row] for row in angles]
    torch.testing.assert_close(waves[0], torch.tensor(closed), atol=2e-4, rtol=0)


def test_dit_is_diffusers_dit():
    """At t = 0 alone: elsewhere diffusers' frequencies end at 1/10000, the published ones one step before."""
    ours = small("dit-ti-2", depth=2)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()
    weights, renamed = ours.state_dict(), {}
    for kind in ("weight", "bias"):
        renamed[f"pos_embed.proj.{kind}"] = weights[f"x_embedder.proj.{kind}"]
        renamed[f"proj_out_1.{kind}"] = weights[f"final_layer.adaLN_modulation.1.{kind}"]
        renamed[f"proj_out_2.{kind}"] = weights[f"final_layer.linear.{kind}"]
        for i in range(2):
            a, b = f"blocks.{i}", f"transformer_blocks.{i}"
            for name, part in zip("qkv", weights[f"{a}.attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{b}.attn1.to_{name}.{kind}"] = part
            renamed[f"{b}.attn1.to_out.0.{kind}"] = weights[f"{a}.attn.proj.{kind}"]
            renamed[f"{b}.norm1.linear.{kind}"] = weights[f"{a}.adaLN_modulation.1.{kind}"]
            renamed[f"{b}.ff.net.0.proj.{kind}"] = weights[f"{a}.mlp.fc1.{kind}"]
            renamed[f"{b}.ff.net.2.{kind}"] = weights[f"{a}.mlp.fc2.{kind}"]
            for name, layer in (("linear_1", 0), ("linear_2", 2)):  # diffusers has a copy in every block
                renamed[f"{b}.norm1.emb.timestep_embedder.{name}.{kind}"] = weights[f"t_embedder.mlp.{layer}.{kind}"]
            labels = "embedding_table.weight"
            renamed[f"{b}.norm1.emb.class_embedder.{labels}"] = weights[f"y_embedder.{labels}"]
    loaded = theirs.load_state_dict(renamed, strict=False)
    assert not loaded.unexpected_keys and all("pos_embed" in key for key in loaded.missing_keys)
    latents, labels = inputs(3)[0], torch.tensor([1, 10, 3])
    expected = theirs(latents, torch.zeros(3, dtype=torch.long), labels).sample
    torch.testing.assert_close(ours(latents, torch.zeros(3), labels), expected, atol=1e-4, rtol=1e-4)


def test_dit_at_another_size_is_the_dit_made_for_that_size():
    wide = small("dit-ti-2", sample_size=(4, 12))
    square = small("dit-ti-2", sample_size=8)
    square.load_state_dict({k: v for k, v in wide.state_dict().items() if k != "pos_embed"}, strict=False)
    assert not wide.pos_embed.requires_grad
    torch.testing.assert_close(square(*inputs(2, 4, 12)), wide(*inputs(2, 4, 12)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(square(*inputs(2, 4, 12)), wide(*inputs(2, 4, 12)), rtol=0, atol=0)


@families
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 10), (14, 6), (2, 2)])
def test_any_size_divisible_by_the_patch_and_any_out_channels(name, height, width):
    model = small(name, out_channels=4 if height == 4 else 8)
    y = model(*inputs(3, height, width))
    assert y.shape == (3, model.config.out_channels, height, width)
    assert y.isfinite().all()


@families
def test_samples_of_a_batch_are_independent_and_depend_on_time_and_label(name):
    model = small(name)
    latents, timesteps, labels = inputs(3)
    together = model(latents, timesteps, labels)
    torch.testing.assert_close(model(latents[1:2], timesteps[1:2], labels[1:2]), together[1:2], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(latents, timesteps + 50, labels), together, atol=1e-3)
    null = torch.full_like(labels, model.null_class)
    assert model.null_class == model.config.num_classes == 10
    assert not torch.allclose(model(latents, timesteps, null), model(latents, timesteps, null - 1), atol=1e-3)


@families
def test_a_new_model_predicts_exactly_zero(name):
    model = create_model(name, **SMALL[name])
    assert model(*inputs()).count_nonzero() == 0


@pytest.mark.parametrize("name", ["dit-ti-2", "gspn-dit-ti-2"])
def test_new_adaln_zero_blocks_are_the_identity(name):
    model = create_model(name, **SMALL[name])
    x, condition = model.embed(*inputs())
    modulation = [condition]
    if name == "gspn-dit-ti-2":
        modulation = [model.modulation(condition), model.block_condition(condition)]
    for block in model.blocks:
        assert torch.equal(block(x, *modulation), x)


def test_unpatchify_puts_row_column_channel_of_each_token_in_place():
    model = create_model("dit-ti-2", patch_size=2, out_channels=3)
    x = torch.randn(2, 3, 5, 2 * 2 * 3)  # (B, H, W, p·p·C_out)
    image = model.unpatchify(x)
    assert image.shape == (2, 3, 6, 10)
    for row in range(6):
        for column in range(10):
            first = (row % 2 * 2 + column % 2) * 3
            assert torch.equal(image[:, :, row, column], x[:, row // 2, column // 2, first : first + 3])


@families
def test_save_and_load_is_bit_equal(name, tmp_path):
    layers = {} if name.startswith("dit") else {"global_layers": [0, -1], "chunk": 3}
    model = small(name, sample_size=(4, 8), **layers)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    loaded = type(model).from_pretrained(tmp_path)
    assert not loaded.training
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: tuple(v) if isinstance(v, list) else v for k, v in model.config.items() if k[0] != "_"
    }
    assert torch.equal(loaded(*inputs(2, 6, 8)), model(*inputs(2, 6, 8)))


@families
def test_gradient_checkpointing_changes_no_gradient(name):
    model = small(name, **({"stochastic_depth": 0.5} if name == "gspn-ti-2" else {})).train()
    calls = []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        torch.manual_seed(2)
        model(*inputs(4)).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(calls) == 3  # once, then once more and once recomputed
    assert len(gradients[0]) == len([p for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@families
def test_bf16_autocast_is_close_to_float32_and_trains(name):
    model = small(name, **({"stochastic_depth": 0.0} if name == "gspn-ti-2" else {}))
    for parameter in model.parameters():  # weights of a usual size, so that rounding stays small
        if parameter.requires_grad and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    exact = model(*inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs())
    rounded.float().square().mean().backward()
    assert (rounded.float() - exact).norm() <= 0.05 * exact.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.skipif(torch.__version__ < "2.11", reason="fake CUDA tensors ask torch 2.8 for a driver")
@pytest.mark.parametrize("one_pass", [False, True])
def test_cudas_autocast_leaves_gspn_dits_map_in_bfloat16(one_pass, monkeypatch):
    """There, not on a CPU, norms and powers become float32, and with them every map up to the next product."""
    if one_pass:
        pytest.importorskip("triton")
    monkeypatch.setattr(fused, "take", lambda x, *vectors: one_pass)
    with FakeTensorMode(), torch.device("cuda"):
        model = create_model("gspn-dit-ti-2", depth=2)
        maps = []
        for module in model.blocks.modules():
            module.register_forward_hook(lambda module, inputs, y: maps.extend([inputs[0].dtype, y.dtype]))
        with cuda_autocast():
            y = model(torch.zeros(2, 4, 32, 32), torch.zeros(2), torch.zeros(2, dtype=torch.long))
            assert model.blocks[0].mixer.norm(torch.zeros(2, 8, 8, 192, dtype=torch.bfloat16)).dtype == torch.bfloat16
            assert nn.functional.layer_norm(y, y.shape).dtype == torch.float32  # as CUDA's autocast has it
    assert len(maps) >= 2 * 2 * 8
    assert set(maps) == {torch.bfloat16}


@contextmanager
def cuda_autocast():
    """CUDA's autocast to bfloat16, which torch.autocast has only where there is a GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


@pytest.mark.slow
@families
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    model = small(name).train(name != "gspn-ti-2")
    eager = model(*inputs())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs())
    torch.testing.assert_close(compiled, eager)
    compiled.square().mean().backward()
    from_compiled = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    eager.square().mean().backward()
    for one, other in zip(from_compiled, (p.grad for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"), [("gspn-ti-2", {"depth": 3}), ("gspn-dit-ti-2", {"depth": 2, "global_layers": 1})]
)
@pytest.mark.parametrize("blockwise", [False, True])
def test_chunk_scale_is_heeded_by_a_compiled_model(name, sizes, blockwise):
    torch._dynamo.reset()
    model = small(name, chunk=2, **sizes)
    scales = (1.0, 1.5, 2.0, 1.0)
    eager = [model(*inputs(2, 16, 16), chunk_scale=scale) for scale in scales]
    if blockwise:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for scale, y in zip(scales, eager, strict=True):
        torch.testing.assert_close(compiled(*inputs(2, 16, 16), chunk_scale=scale), y)
    assert not any(torch.allclose(one, other) for one, other in pairwise(eager))


@families
def test_blocks_compile_by_themselves_as_diffusers_compiles_them(name):
    torch._dynamo.reset()
    model = small(name)
    eager = model(*inputs())
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(model(*inputs()), eager)
    assert all(block._compiled_call_impl is not None for block in model.blocks)


def test_squared_relu_is_zero_below_zero_and_the_square_above():
    assert SquaredReLU()(torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])).tolist() == [0, 0, 0, 0.25, 9]
    assert isinstance(create_model("gspn-dit-ti-2").blocks[0].mlp.act, SquaredReLU)


def test_a_gspn_block_is_its_formula():
    """y = core(conv₇(W norm(x))), z = conv₃(W y); the block adds W (z ⊙ max(z, 0)) to x, the joined input."""
    block = small("gspn-ti-2").blocks[3]
    x, kept = torch.randn(2, 2, 4, 6, 32)

    def filtered(y, conv):
        return F.conv2d(y.movedim(-1, 1), conv.weight, conv.bias, padding="same", groups=32).movedim(1, -1)

    weight = {name: layer.weight for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    joined = x @ weight["join"][:, :32].T + kept @ weight["join"][:, 32:].T + block.join.bias
    normed = F.layer_norm(joined, (32,), block.norm.weight, block.norm.bias)
    y = block.core(filtered(normed @ weight["proj_in"].T, block.conv_in))
    z = filtered(y @ weight["proj_core"].T, block.conv_out)
    expected = joined + (z * z.clamp(min=0)) @ weight["proj_out"].T
    torch.testing.assert_close(block(x, kept), expected, atol=1e-4, rtol=1e-4)
    assert (block.conv_in.kernel_size, block.conv_out.kernel_size) == ((7, 7), (3, 3))


def test_gspn_keeps_the_first_half_and_joins_it_mirrored_in_the_second():
    model = small("gspn-ti-2")
    latents, timesteps, labels = inputs()
    b = model.blocks
    condition = (model.t_embedder(timesteps) + model.y_embedder(labels))[:, None, None]
    x = model.x_embedder(latents) + condition
    assert model.chunks == (2, 2, 2, None, None)
    first = b[0](x, None, 2)
    second = b[1](first, None, 2)
    y = b[4](b[3](b[2](second, None, 2), second), first)
    y = F.layer_norm(y, (32,), model.norm.weight, model.norm.bias)
    shift, scale = model.final_layer.adaLN_modulation(condition).chunk(2, dim=-1)
    y = model.final_layer.linear(F.layer_norm(y, (32,), eps=1e-6) * (1 + scale) + shift)
    torch.testing.assert_close(model(latents, timesteps, labels), model.unpatchify(y), atol=1e-4, rtol=1e-4)


def test_stochastic_depth_keeps_or_drops_whole_branches_and_rises_with_depth():
    torch.manual_seed(0)
    block = GSPNBlock(16, drop_chance=0.5, joins=False)
    x = torch.randn(64, 4, 4, 16)
    branch = block.eval()(x, None, 2) - x
    scales = ((block.train()(x, None, 2) - x) * branch).sum((1, 2, 3)) / branch.square().sum((1, 2, 3))
    kept = scales > 1
    torch.testing.assert_close(scales, kept * 2.0, atol=1e-3, rtol=0)  # so the mean over many is the eval branch
    assert 16 < kept.sum() < 48
    chances = [block.drop_chance for block in create_model("gspn-ti-2").blocks]
    torch.testing.assert_close(torch.tensor(chances), torch.linspace(0, 0.1, 7))


@torch.no_grad()
@pytest.mark.parametrize("saved", [{}, {"windows": None}, {"windows": "shifted"}, {"windows": "aligned"}], ids=str)
def test_a_model_saved_before_windows_were_the_default_still_has_chunks_of_lines(saved, tmp_path):
    """By its configuration, whoever reads it, on a map larger than a chunk."""
    torch.manual_seed(0)
    options = {"width": 16, "num_groups": 1, "depth": 3, "chunk": 8}
    model = create_model("gspn-dit-ti-1", **options, windows=saved.get("windows"))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.pop("windows") == saved.get("windows")
    (tmp_path / "config.json").write_text(json.dumps(written | saved))
    loaded = GSPNDiT.from_pretrained(tmp_path)
    inputs = torch.randn(1, 4, 12, 9), torch.tensor([500.0]), torch.tensor([3])
    torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=1e-4, atol=1e-3)
    assert GSPNDiT.from_config(loaded.config).chunks == loaded.chunks == model.chunks
    as_new = create_model("gspn-dit-ti-1", **options)
    assert GSPNDiT.from_config(loaded.config, windows="shifted").chunks == as_new.chunks


def test_a_copy_by_its_configuration_is_as_new_as_the_model():
    model = create_model("gspn-dit-ti-1", chunk=4)
    assert GSPNDiT.from_config(model.config).chunks == GSPNDiT.from_config(dict(model.config)).chunks == model.chunks


def test_dit_has_no_chunks_to_scale():
    model = small("dit-ti-2")
    assert torch.equal(model(*inputs(), chunk_scale=1.0), model(*inputs()))
    with pytest.raises(InputError, match=r"chunk_scale=2.0: no layer of this DiT has a chunk; leave it out"):
        model(*inputs(), chunk_scale=2.0)


class TextModel(LatentModel):
    """A family with a condition of its own: vectors of a text, of which it takes the mean."""

    @register_to_config
    def __init__(
        self,
        width: int = 16,
        text_width: int = 6,
        sample_size: int = 8,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 4,
    ) -> None:
        super().__init__(
            width=width,
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
        )
        self.t_embedder, self.y_embedder = TimestepEmbedding(width), nn.Linear(text_width, width)
        self.mixer = GSPNMixer(width, 2)
        self.last = nn.Linear(width, self.patch_values)

    def example_condition(self, batch: int) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": torch.zeros(batch, 3, 6, device=self.device)}

    def forward(self, latents, timesteps, encoder_hidden_states, chunk_scale=1.0):
        self.check_chunk_scale(chunk_scale)
        x = self.patchify(latents)
        x = x + (self.t_embedder(timesteps) + self.y_embedder(encoder_hidden_states).mean(1))[:, None, None]
        return self.unpatchify(self.last(x + self.run(self.mixer, x)))


def test_a_family_may_be_conditioned_on_what_it_likes_and_registers_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_presets", dict(registry._presets))  # gone again after the test
    assert register_model("text", {"s": {"width": 16}, "b": {"width": 32}})(TextModel) is TextModel
    assert list_models("text-*") == [f"text-{size}-{patch}" for size in "sb" for patch in (1, 2, 4, 8)]
    model = create_model("text-s-2", text_width=6)
    assert registry.find_class("TextModel") is TextModel
    latents, timesteps, _ = inputs()
    condition = {"encoder_hidden_states": torch.randn(2, 5, 6)}
    model.enable_gradient_checkpointing()
    y = model(latents, timesteps, **condition)
    y.square().mean().backward()
    assert y.shape == latents.shape and all(p.grad is not None for p in model.parameters())
    assert count_macs(model, (8, 8)) > 0
    model.save_pretrained(tmp_path)
    assert torch.equal(TextModel.from_pretrained(tmp_path)(latents, timesteps, **condition), y)


def test_models_are_listed_family_by_family_and_by_pattern(monkeypatch):
    by_import = list(registry._presets.items())
    monkeypatch.setattr(registry, "_presets", dict([*by_import[20:], *by_import[:20]]))  # as another order of imports
    names = list_models()
    assert len(names) == 80 and names[::20] == ["dit-ti-1", "gspn-ti-1", "gspn-dit-ti-1", "gspn-t2i-ti-1"]
    assert names[-1] == "gspn-t2i-xl-8"
    assert list_models("gspn-dit-*-2") == [f"gspn-dit-{size}-2" for size in ("ti", "s", "b", "l", "xl")]
    assert list_models("gspn-*") == names[20:]
    assert list_models("mamba-*") == []


@families
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 4, 8, 7)}, "8×7.*divisible by the patch size, 2"),
        ({0: torch.zeros(2, 3, 8, 8)}, r"^latents: shape \(2, 3, 8, 8\); wanted \(B, 4,"),
        ({1: torch.zeros(3)}, r"^timesteps: shape \(3,\); wanted .*\(2,\)"),
        ({2: torch.zeros(2, 1, dtype=torch.long)}, r"^class_labels: shape \(2, 1\)"),
        ({1: torch.tensor(3)}, r"^timesteps: shape \(\); wanted .*\(2,\)"),
        ({1: 500}, r"timesteps=500: give a tensor of one for each latent, \(2,\)"),
        ({2: torch.zeros(2)}, "class_labels: dtype torch.float32; wanted class ids"),
        ({2: torch.tensor([0, -1])}, "class_labels: -1 is among them; give 0 to"),
        ({2: torch.tensor([1001, 0])}, "class_labels: 1001 is among them; give 0 to"),
    ],
)
def test_misshapen_input_is_refused_by_name(name, change, message):
    arguments = [change.get(i, argument) for i, argument in enumerate(inputs())]
    with pytest.raises(InputError, match=message):
        small(name)(*arguments)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("gspn-dit-x-2", {}, "name='gspn-dit-x-2': no such model; did you mean .*gspn-dit-xl-2"),
        ("dit-s-2", {"chunk": 2}, "chunk=2: dit-s-2 has no such option; choose from width, depth, num_heads"),
        ("dit-s-2", {"sample_size": 7}, "sample_size=7: .*patch_size=2"),
        ("gspn-s-2", {"sample_size": (8, 9)}, "sample_size=.*patch_size=2"),
        ("dit-s-2", {"num_heads": 5}, "num_heads=5"),
        ("gspn-s-2", {"depth": 4}, "depth=4: give an odd number"),
        ("gspn-s-2", {"chunk": 0}, "chunk=0"),
        ("gspn-s-2", {"stochastic_depth": 1.0}, "stochastic_depth=1.0"),
        ("gspn-dit-s-2", {"num_groups": 5}, "num_groups=5: give a divisor of width=384"),
        ("gspn-dit-s-2", {"conv_kernel": 4}, "conv_kernel=4: give an odd number"),
        ("gspn-dit-s-2", {"global_layers": 13}, "global_layers=13: .*12 layers"),
        ("gspn-dit-s-2", {"global_layers": [12]}, r"global_layers=\[12\]: .*0 to 11"),
        ("gspn-dit-s-2", {"num_classes": 0}, "num_classes=0"),
        ("gspn-dit-s-2", {"width": "abc"}, "width='abc': give a whole number"),
        ("dit-s-2", {"width": "abc"}, "width='abc': give a whole number"),
        ("gspn-s-2", {"width": None}, "width=None: give a whole number"),
        ("gspn-s-2", {"depth": "deep"}, "depth='deep'"),
        ("gspn-s-2", {"stochastic_depth": "some"}, "stochastic_depth='some'"),
        ("gspn-dit-s-2", {"conv_kernel": "big"}, "conv_kernel='big': give an odd number"),
        ("gspn-dit-s-2", {"mlp_ratio": -1}, "mlp_ratio=-1: give a positive number"),
        ("dit-s-2", {"mlp_ratio": "4"}, "mlp_ratio='4': give a positive number"),
        ("gspn-dit-s-2", {"global_layers": None}, "global_layers=None: give a count"),
        ("gspn-dit-s-2", {"global_layers": "all"}, "global_layers='all': give a count"),
        ("dit-s-2", {"sample_size": None}, "sample_size=None"),
    ],
)
def test_what_a_model_cannot_take_is_refused_by_name(name, overrides, message):
    with torch.device("meta"), pytest.raises(InputError, match=message):
        create_model(name, **overrides)


def test_depthwise_convolution_needs_no_layout_copies():
    mixer = GSPNDiT(width=32, depth=2, num_groups=2).blocks[0].mixer
    value = mixer.value(torch.randn(2, 6, 5, 32))
    assert mixer.conv(value).is_contiguous()
    gates, input_gate = mixer.token_gates(value)
    assert gates.data_ptr() + 12 * gates.element_size() == input_gate.data_ptr()  # a group's numbers side by side
    assert (gates.shape, input_gate.shape) == ((2, 6, 5, 4, 3, 2), (2, 6, 5, 4, 2))


def test_the_package_is_light_to_import_and_finds_its_names():
    light = "import sys, gspn_dit; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], check=False).returncode == 0
    assert gspn_dit.DiT is DiT
    assert gspn_dit.create_model is create_model
    assert gspn_dit.ModelMixin is diffusers.ModelMixin
    with pytest.raises(AttributeError, match="nothing"):
        _ = gspn_dit.nothing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_table_counts_the_models_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["models", "--names", "[dit-xl-2,gspn-s-2]"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("gspn_dit.models", run_name="__main__", alter_sys=True)
    assert end.value.code is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["dit-xl-2", "675,129,632", "118.6", "524.5"],
        ["gspn-s-2", "20,151,812", "4.8", "19.2"],
    ]


def test_the_table_gives_each_row_before_it_makes_the_next_model(capsys, monkeypatch):
    rows_before = []

    def create(name):
        rows_before.append(len(capsys.readouterr().out.splitlines()))
        return create_model(name, **SMALL["dit-ti-2"])

    monkeypatch.setattr(table, "create_model", create)
    table.main(ModelsOptions(["dit-ti-2", "dit-ti-4"]))
    assert rows_before == [1, 1]  # the heading, then the first row


def test_the_table_refuses_an_unknown_name_before_any_row(capsys):
    with pytest.raises(InputError, match="names='dit-xx-2': no such model"):
        table.main(ModelsOptions(["dit-ti-2", "dit-xx-2"]))
    assert capsys.readouterr().out == ""
