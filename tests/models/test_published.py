"""Published weights of DiT and SiT, in every format they come in, are the networks that their authors run."""

import argparse
import json
import logging
import re

import pytest
import torch
from made.published import as_of_dits_code, diffusers_dit, dit_state_dict, sit_state_dict
from safetensors.torch import save_file

from gspn_dit.diffusion import Flow
from gspn_dit.errors import InputError
from gspn_dit.layers.embeddings import TimestepEmbedding
from gspn_dit.models import DiT

TIMES = torch.tensor([0.0, 3.0, 250.0, 731.0, 999.0])
LABELS = torch.tensor([0, 9, 10, 4, 7])  # 10 is no class


def latents(size: int = 8) -> torch.Tensor:
    return torch.randn(len(TIMES), 4, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(network, x, times, labels):
    return network(x, timestep=times, class_labels=labels).sample


def saved(path, state):
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network():
    return diffusers_dit()


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}])
def test_a_transformer_of_diffusers_gives_diffusers_output(tmp_path, network, options):
    network.save_pretrained(tmp_path, **options)
    model = DiT.from_pretrained(tmp_path)
    assert not model.training and model.config.time_embedding == "diffusers"
    expected = theirs(network, latents(), TIMES, LABELS)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(latents(), TIMES, LABELS), expected, atol=1e-4, rtol=0)


def test_at_other_sizes_it_still_gives_diffusers_output(tmp_path, network):
    """diffusers spreads positions over the trained grid: here of 4 × 4 tokens, for 6 × 6."""
    network.save_pretrained(tmp_path)
    model = DiT.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "ours")
    expected = theirs(network, latents(12), TIMES, LABELS)
    for each in (model, DiT.from_pretrained(tmp_path / "ours")):
        torch.testing.assert_close(each(latents(12), TIMES, LABELS), expected, atol=1e-4, rtol=0)
    wide = torch.cat([latents(12)] * 2, dim=3)  # which diffusers refuses
    assert model(wide, TIMES, LABELS).shape == (5, 8, 12, 24)


def test_a_transformer_of_before_dit_had_a_class_loads(tmp_path, network):
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    model = DiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(
        model.float()(latents(), TIMES, LABELS), theirs(network, latents(), TIMES, LABELS), atol=0.1, rtol=0
    )


@pytest.mark.parametrize("nest", [None, "model", "ema"])
def test_dits_own_file_gives_dits_output(tmp_path, nest):
    """Of a checkpoint of a training the averaged weights, where it has them."""
    state = dit_state_dict(as_of_dits_code(network := diffusers_dit()))
    if nest:
        arguments = argparse.Namespace(model="DiT-XL/2", image_size=64)
        others = {"model": {"pos_embed": torch.zeros(1)}} if nest == "ema" else {}
        state = {**others, nest: state, "opt": {"state": {0: {"step": 1}}}, "args": arguments}
    model = DiT.from_pretrained(saved(tmp_path / "DiT-Ti-2-64x64.pt", state))
    torch.testing.assert_close(
        model(latents(), TIMES, LABELS), theirs(network, latents(), TIMES, LABELS), atol=1e-4, rtol=0
    )


def test_a_file_says_what_it_is(tmp_path, caplog):
    network = diffusers_dit(num_layers=3, num_classes=7, sample_size=12)
    state, sit = dit_state_dict(network), sit_state_dict(network)
    with caplog.at_level(logging.INFO, "gspn_dit"):
        config = DiT.from_pretrained(saved(tmp_path / "DiT.pt", state)).config
        DiT.from_pretrained(saved(tmp_path / "weights.pt", {"ema": sit}))
    assert (config.num_heads, config.mlp_ratio, config.patch_size, config.out_channels) == (3, 4, 2, 8)
    what = "3 blocks of 192, 7 classes, 12 × 12 latents"
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/DiT.pt: DiT's own checkpoint: {what}; noise and variance",
        f"{tmp_path}/weights.pt: SiT's own checkpoint, its ema: {what}; velocity; variance channels dropped",
    ]


def test_sits_own_file_is_its_velocity_on_its_time_axis(tmp_path):
    """SiT (arXiv 2401.08740): x_t = t·x₁ + (1 - t)·x₀ with data x₁ and noise x₀, told t; it predicts x₁ - x₀."""
    network = as_of_dits_code(diffusers_dit())  # SiT's network is DiT's
    model = DiT.from_pretrained(saved(tmp_path / "weights.pt", sit_state_dict(network)))
    t = torch.tensor([0.0, 0.1, 0.5, 0.75, 1.0])
    data_minus_noise = theirs(network, latents(), t, LABELS)[:, :4]
    assert (theirs(network, latents(), 1 - t, LABELS)[:, :4] - data_minus_noise).abs().max() > 1e-3
    noise_minus_data = model(latents(), 1000 * (1 - t), LABELS)
    torch.testing.assert_close(noise_minus_data, -data_minus_noise, atol=1e-5, rtol=0)


def test_the_loss_of_a_sit_is_the_published_one(tmp_path):
    """|v(x_t, t) - (x₁ - x₀)|² at the published point of the path is the loss of our objective at ours."""
    network = as_of_dits_code(diffusers_dit())
    model = DiT.from_pretrained(saved(tmp_path / "weights.pt", sit_state_dict(network)))
    data, noise, t = latents(), latents().flip(0), torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9])
    s = t[:, None, None, None]
    velocity = theirs(network, s * data + (1 - s) * noise, t, LABELS)[:, :4]
    published = (velocity - (data - noise)).square().flatten(1).mean(1)
    batch = {"latents": data, "noise": noise, "u": 1 - t, "condition": {"class_labels": LABELS}}
    torch.testing.assert_close(Flow().loss(model, batch), published, atol=1e-5, rtol=1e-5)


def test_whose_a_file_is_is_known_by_what_it_says(tmp_path):
    """By its training's arguments, by channels that no loss has moved with its name, or by whoever asks."""
    dit, sit = dit_state_dict(diffusers_dit()), sit_state_dict(diffusers_dit())
    half = dit_state_dict(diffusers_dit(out_channels=4))
    new = {name: torch.zeros_like(value) if "final_layer" in name else value for name, value in dit.items()}

    def channels(name, state, **options):
        return DiT.from_pretrained(saved(tmp_path / name, state), **options).config.out_channels

    assert (
        channels("DiT-XL-2-256x256.pt", dit) == channels("transition.pt", dit) == channels("dit-and-sit.pt", dit) == 8
    )
    assert channels("a.pt", sit) == channels("SiT-XL-2-256x256.pt", sit) == channels("dit-and-sit.pt", sit) == 4
    assert channels("a.pt", {"ema": dit, "args": argparse.Namespace(model="SiT-XL/2", prediction="velocity")}) == 4
    assert channels("a.pt", {"ema": new, "args": argparse.Namespace(model="DiT-XL/2")}) == 8
    assert (channels("dit_step0.pt", new), channels("sit_step0.pt", new)) == (8, 4)
    assert channels("a.pt", dit, convention="sit") == 4
    assert channels("a.pt", sit, convention="dit") == 8
    assert channels("my-sit.pt", half) == 4
    for name, state, words in (
        ("a.pt", half, "4 output channels may be noise or a velocity"),
        ("a.pt", new, "its last layer is zero: its channels may be noise or a velocity"),
        ("SiT-XL-2.pt", dit, "variance channels are not zero, as DiT's are, and its name says SiT"),
        ("DiT-XL-2.pt", sit, "variance channels are zero, as SiT's are, and its name says DiT"),
    ):
        with pytest.raises(InputError, match=f"{words}.*export it with --convention dit or --convention sit"):
            channels(name, state)
    with pytest.raises(InputError, match="without a variance"):
        channels("a.pt", half, convention="dit")
    with pytest.raises(InputError, match="convention='edm'"):
        channels("a.pt", dit, convention="edm")
    with pytest.raises(InputError, match="path_type GVP"):
        channels("a.pt", {"ema": dit, "args": argparse.Namespace(model="SiT-B/2", path_type="GVP")})


def test_a_file_of_safetensors_is_as_good(tmp_path):
    state = dit_state_dict(diffusers_dit())
    save_file(state, tmp_path / "dit.safetensors")
    ours, same = (
        DiT.from_pretrained(path).state_dict()
        for path in (tmp_path / "dit.safetensors", saved(tmp_path / "dit.pt", state))
    )
    assert all(torch.equal(ours[name], state[name]) and torch.equal(same[name], state[name]) for name in state)


def test_half_precision_becomes_float32(tmp_path):
    state = {name: tensor.half() for name, tensor in dit_state_dict(diffusers_dit()).items()}
    model = DiT.from_pretrained(saved(tmp_path / "dit.pt", state))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


class Stranger:
    pass


def test_a_file_that_could_run_code_is_not_read(tmp_path):
    with pytest.raises(InputError, match=r"an object, .*Stranger.*; where you trust it.*state_dict") as error:
        DiT.from_pretrained(saved(tmp_path / "a.pt", {"model": Stranger()}))
    assert "\n" not in str(error.value)


def other(name, value):
    """A DiT's weights, one of which is another."""
    return {**dit_state_dict(diffusers_dit()), name: value}


def without(name):
    return {other: value for other, value in dit_state_dict(diffusers_dit()).items() if other != name}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda: {"weight": torch.zeros(3)}, "its 1 tensors are not a DiT's.*weights of DiT or SiT"),
        (lambda: [1, 2], "a list that is no state dict"),
        (lambda: other("projectors.0.weight", torch.zeros(3)), r"projectors.0.weight is \(3,\).*no such weight"),
        (lambda: other("blocks.1.attn.proj.bias", torch.zeros(3)), r"blocks.1.attn.proj.bias is \(3,\).*\(192,\)"),
        (lambda: other("blocks.4.attn.proj.bias", torch.zeros(192)), "blocks.2.* is not there"),
        (lambda: other("final_layer.linear.bias", torch.zeros(3)), r"final_layer.linear.bias is \(3,\).*\(32,\)"),
        (lambda: without("final_layer.linear.bias"), "final_layer.linear.bias is not there"),
        (lambda: other("y_embedder.embedding_table.weight", torch.tensor(1.0)), "are not a DiT's"),
        (
            lambda: other("blocks.1.attn.proj.bias", torch.zeros(192, dtype=torch.int8)),
            "blocks.1.attn.proj.bias is torch.int8; wanted weights in floating point",
        ),
        (lambda: other("pos_embed", torch.randn(1, 16, 192)), "not DiT's table"),
        (lambda: other("pos_embed", torch.randn(1, 15, 192)), "15 positions"),
        (lambda: dit_state_dict(diffusers_dit(attention_head_dim=32)), "its width is 96.*192, 384, 768, 1024, 1152"),
    ],
)
def test_a_file_that_is_none_of_these_is_refused_in_one_line(tmp_path, state, words):
    with pytest.raises(InputError, match=words) as error:
        DiT.from_pretrained(saved(tmp_path / "dit.pt", state()))
    assert "\n" not in str(error.value)


def test_files_that_are_no_weights_are_refused(tmp_path):
    for name, words in (("a.pt", "cannot be read as a file of torch"), ("a.yaml", "is a file; wanted a folder")):
        for content in (b"", b"nonsense" * 20):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError, match=words):
                DiT.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_that_broke_off_is_to_be_downloaded_again(tmp_path, suffix, share):
    whole = tmp_path / f"dit.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(dit_state_dict(diffusers_dit()), whole)
    content = whole.read_bytes()
    whole.write_bytes(content[: int(len(content) * share)])
    kind = "safetensors" if suffix == "safetensors" else "torch"
    with pytest.raises(InputError, match=f"^it cannot be read as a file of {kind}; .*; download it again$") as error:
        DiT.from_pretrained(whole)
    assert "\n" not in str(error.value)


def test_a_folder_that_broke_off_is_to_be_downloaded_again(tmp_path, network):
    network.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"cannot be read.*; download it again$") as error:
        DiT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json is no model's; download it again$"):
        DiT.from_pretrained(tmp_path)


def test_the_convention_of_a_folder_is_not_open(tmp_path, network):
    network.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="convention='sit': only a file of weights leaves it open"):
        DiT.from_pretrained(tmp_path, convention="sit")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation_fn": "gelu"}, "activation_fn is 'gelu'"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06; wanted a DiT, which has 1e-05"),
        ({"out_channels": 4}, "noise and variance"),
    ],
)
def test_a_transformer_of_diffusers_that_is_no_dit_is_refused(tmp_path, options, words):
    diffusers_dit(**options).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=words):
        DiT.from_pretrained(tmp_path)


def test_blocks_with_embedders_of_their_own_are_refused(tmp_path, network):
    torch.manual_seed(0)
    own = diffusers_dit()
    torch.nn.init.normal_(own.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight)
    own.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=re.escape("transformer_blocks.1 embeds times or classes otherwise")):
        DiT.from_pretrained(tmp_path)


@pytest.mark.parametrize("convention", ["dit", "sit", "diffusers"])
def test_times_are_embedded_as_each_project_does(convention):
    embedding, seen = TimestepEmbedding(8, convention), []
    embedding.mlp.register_forward_pre_hook(lambda mlp, inputs: seen.append(inputs[0]))
    embedding(TIMES)
    frequencies = 10_000 ** -(torch.arange(128) / (127 if convention == "diffusers" else 128))
    times = 1 - TIMES / 1000 if convention == "sit" else TIMES
    angles = times[:, None] * frequencies
    torch.testing.assert_close(seen[0], torch.cat([angles.cos(), angles.sin()], 1), atol=2e-4, rtol=0)


def test_a_convention_that_nobody_has_is_refused():
    with pytest.raises(InputError, match="time_embedding='edm'"):
        DiT(width=32, depth=1, num_heads=2, time_embedding="edm")


def test_a_converted_model_comes_back_as_it_is(tmp_path):
    model = DiT.from_pretrained(saved(tmp_path / "a.pt", sit_state_dict(diffusers_dit())))
    model.save_pretrained(tmp_path / "ours")
    again = DiT.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(latents(), TIMES, LABELS), model(latents(), TIMES, LABELS))
    larger = again(latents(12), TIMES, LABELS)  # its table is computed for other sizes
    assert larger.shape == (5, 4, 12, 12) and larger.isfinite().all()
