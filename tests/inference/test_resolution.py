"""Sizes a model was not trained at: the switches do what they say and no more, what saves memory changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from made.runs import pipeline, tiny_vae
from PIL import Image

from gspn_dit.autoencoder import decode, encode_moments
from gspn_dit.autoencoder.tiling import decode_in_tiles, encode_in_tiles, mosaic, tile_side
from gspn_dit.diffusion import create_scheduler, image_generator
from gspn_dit.diffusion.schedulers import own_shift, shifted
from gspn_dit.errors import InputError
from gspn_dit.layers import feed_forward
from gspn_dit.layers.chunks import Chunk, scale_chunk
from gspn_dit.layers.feed_forward import FeedForward
from gspn_dit.layers.windows import Window
from gspn_dit.models import create_model


@contextmanager
def chunks_of_calls(model) -> Iterator[list[Chunk]]:
    """In the block, the chunks that the model's scanning layers are called with, in their order."""
    layers = [block.mixer if hasattr(block, "mixer") else block.core for block in model.blocks]
    chunks = []
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: chunks.append(inputs[1])) for layer in layers]
    yield chunks
    for hook in hooks:
        hook.remove()


def draw(pipe, **options) -> torch.Tensor:
    options = {"num_inference_steps": 4, "output_type": "latent", **options}
    return pipe([1], generator=[image_generator(0, 0)], **options).images


@pytest.mark.parametrize(("scale", "scaled"), [(4, 16), (2.4, 10), (0.5, 2), (0.01, 1)])
@pytest.mark.parametrize(
    ("name", "options", "local"),
    [
        ("gspn-dit-ti-2", {}, lambda lines: {Window(lines), Window(lines, shifted=True)}),
        ("gspn-dit-ti-2", {"windows": None}, lambda lines: {lines}),
        ("gspn-ti-2", {}, lambda lines: {lines}),
    ],
)
def test_chunk_scale_changes_the_chunk_of_local_layers_alone(name, options, local, scale, scaled):
    model = create_model(name, chunk=4, sample_size=8, num_classes=3, **options)
    inputs = torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for how, lines in (({}, 4), ({"chunk_scale": scale}, scaled), ({"chunk_scale": 1}, 4)):
        with chunks_of_calls(model) as chunks:
            model(*inputs, **how)
        assert chunks[-2:] == [None, None] and set(chunks[:-2]) == local(lines)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_chunk_scale_leaves_the_model_after_an_exception():
    pipe = pipeline()
    plain = draw(pipe, height=32, width=32)

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with chunks_of_calls(pipe.transformer) as chunks, pytest.raises(KeyboardInterrupt):
        draw(pipe, chunk_scale=2, callback_on_step_end=stop)
    own = list(pipe.transformer.chunks)
    assert chunks == [scale_chunk(chunk, 2) for chunk in own] != own
    assert torch.equal(draw(pipe, height=32, width=32), plain)


def test_chunk_scale_is_a_model_of_that_chunk():
    pipe = pipeline()
    weights = pipe.transformer.state_dict()

    def chunked(chunk):
        model = create_model("gspn-dit-ti-2", chunk=chunk, sample_size=8, num_classes=3, out_channels=4).eval()
        model.load_state_dict(weights)
        return model

    pipe.transformer = chunked(4)
    plain = draw(pipe, height=32, width=32)
    scaled = draw(pipe, height=32, width=32, chunk_scale="auto")
    assert torch.equal(draw(pipe, height=32, width=32), plain)
    assert not torch.equal(scaled, plain)
    pipe.transformer = chunked(8)
    assert torch.equal(draw(pipe, height=32, width=32), scaled)


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc"])
@pytest.mark.parametrize("s", [0.5, 4.0])
def test_shift_moves_the_noise_levels_by_the_formula(sampler, s):
    """Also where the scheduler has a shift of its own, which is replaced."""
    if sampler == "unipc":
        plain = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    else:
        plain = create_scheduler("flow", sampler)
    option = "flow_shift" if sampler == "unipc" else "shift"
    moved = [shifted(scheduler, s) for scheduler in (plain, type(plain).from_config(plain.config, **{option: 3.0}))]
    arguments = {"sigmas": np.linspace(1, 0.1, 10)} if sampler == "euler" else {}
    for scheduler in (plain, *moved):
        scheduler.set_timesteps(10, **arguments)
    for scheduler in moved:
        assert own_shift(scheduler) == s
        torch.testing.assert_close(scheduler.sigmas, s * plain.sigmas / (1 + (s - 1) * plain.sigmas))
        torch.testing.assert_close(scheduler.timesteps / 1000, scheduler.sigmas[:-1], rtol=0, atol=1.001e-3)
    assert own_shift(plain) == 1


def test_shift_and_chunk_scale_reach_the_model_and_leave_the_pipeline():
    pipe, times = pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda model, inputs: times.append(float(inputs[1][0]) / 1000))
    draw(pipe, height=32, width=64, shift="auto", chunk_scale="auto")  # 8 times the pixels
    s = math.sqrt(8)
    assert times == pytest.approx([s * t / (1 + (s - 1) * t) for t in (1, 0.75, 0.5, 0.25)])
    times.clear()
    draw(pipe)
    assert times == pytest.approx([1, 0.75, 0.5, 0.25])


def test_auto_is_the_number_and_at_the_trained_size_changes_nothing():
    pipe = pipeline()
    plain = draw(pipe)
    assert torch.equal(draw(pipe, shift="auto", chunk_scale="auto"), plain)
    assert pipe.size_switches(32, 32, "auto", "auto") == (2, 2)
    assert pipe.size_switches(32, 32) == (None, None)
    assert torch.equal(draw(pipe, height=32, shift="auto"), draw(pipe, height=32, shift=math.sqrt(2)))
    assert not torch.equal(draw(pipe, height=32, shift="auto"), draw(pipe, height=32))
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    assert pipe.size_switches(32, 32, "auto") == (6, None)  # its own at the trained size, twice that at twice the side


@pytest.mark.parametrize(
    ("name", "objective", "options", "words"),
    [
        ("gspn-dit-ti-2", "ddpm", {"shift": 2.0}, "shift=2.0: DDPMScheduler samples the ddpm objective"),
        ("gspn-dit-ti-2", "ddpm", {"shift": "auto"}, "only flow models have a shift"),
        ("gspn-dit-ti-2", "flow", {"shift": 0}, "shift=0: wanted a positive number"),
        ("gspn-dit-ti-2", "flow", {"shift": math.nan}, "shift=nan: wanted a positive number"),
        ("gspn-dit-ti-2", "flow", {"chunk_scale": -1.0}, "chunk_scale=-1.0: wanted a positive number"),
        ("dit-ti-2", "flow", {"chunk_scale": 2.0}, "no layer of this DiT has a chunk"),
        ("gspn-dit-ti-2", "flow", {"chunk_scale": math.nan}, "chunk_scale=nan: wanted a positive number"),
        ("gspn-dit-ti-2", "flow", {"chunk_scale": "far"}, "chunk_scale='far': wanted a positive number"),
        ("dit-ti-2", "flow", {"shift": "far"}, "shift='far': wanted a positive number"),
    ],
)
def test_refusals_before_any_forward(name, objective, options, words):
    pipe, forwards = pipeline(name, objective), []
    pipe.transformer.register_forward_pre_hook(lambda model, inputs: forwards.append(inputs))
    with pytest.raises(InputError, match=words):
        draw(pipe, **options)
    assert forwards == []


def test_auto_leaves_a_model_without_chunks_as_it_is():
    pipe = pipeline("dit-ti-2", "flow")
    assert torch.equal(draw(pipe, width=32, chunk_scale="auto"), draw(pipe, width=32))


def test_models_without_scans_have_no_chunk():
    for options in ({"mixer": "attention"}, {"chunk": None}):
        model = create_model("gspn-dit-ti-2", sample_size=8, **options)
        with pytest.raises(InputError, match="no layer of this GSPNDiT has a chunk"):
            model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long), chunk_scale=2)


@pytest.mark.parametrize("tokens", [8, 7, 64])
def test_feed_forward_in_slices_is_the_feed_forward(monkeypatch, tokens):
    torch.manual_seed(0)
    layer, x = FeedForward(16, 4.0).eval(), torch.randn(2, 5, 7, 16)
    with torch.no_grad():
        whole = layer(x)
        seen = []
        layer.fc1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
        monkeypatch.setattr(feed_forward, "SLICE_TOKENS", tokens)
        torch.testing.assert_close(layer(x), whole)
        torch.testing.assert_close(layer(x.transpose(1, 2)), whole.transpose(1, 2))
        assert max(seen) == min(tokens, 70) if tokens < 35 else seen == [70, 70]  # 64 tokens hold one map
        seen.clear()
    layer(x).sum().backward()  # never with gradients
    assert seen == [70]


def test_tiled_decoding_is_nearly_the_whole_and_leaves_the_vae(monkeypatch):
    """Also where one end of the image is unlike the other, of which tiles with norms of their own know nothing."""
    monkeypatch.setattr("gspn_dit.autoencoder.tiling.TILE_PIXELS", 64)
    vae = tiny_vae()
    latents = torch.randn(1, 4, 96, 72, generator=torch.Generator().manual_seed(0))
    latents = latents * torch.linspace(0.3, 1.5, 96)[:, None] + torch.linspace(-1, 1, 72)
    tiling = {name: value for name, value in vars(vae).items() if "til" in name}
    whole = decode(vae, latents).int()
    tiled = decode_in_tiles(vae, latents).int()
    assert {name: value for name, value in vars(vae).items() if "til" in name} == tiling and not vae.use_tiling
    assert torch.equal(decode(vae, latents).int(), whole)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 32, 64
    alone = decode_in_tiles(vae, latents).int()  # somebody's own tiling, as diffusers does it
    assert torch.equal(alone, decode(vae, latents).int())
    difference, of_its_own = ((other - whole).abs().float().mean() for other in (tiled, alone))
    assert 0 < difference < 0.1 * whole.float().std()
    assert difference < 0.3 * of_its_own


def test_tiled_encoding_is_nearly_the_whole_and_leaves_the_vae(monkeypatch):
    """Of a picture whose ends are unlike, which tiles with norms of their own know nothing of."""
    monkeypatch.setattr("gspn_dit.autoencoder.tiling.TILE_PIXELS", 64)
    vae = tiny_vae()
    latents = torch.randn(1, 4, 96, 72, generator=torch.Generator().manual_seed(0))
    picture = decode(vae, latents * torch.linspace(0.3, 1.5, 96)[:, None] + torch.linspace(-1, 1, 72)).float()
    picture = (picture * torch.linspace(0.2, 1, 192)[:, None]).to(torch.uint8)
    whole = encode_moments(vae, picture)
    tiled = encode_in_tiles(vae, picture)
    assert tiled.shape == whole.shape and not vae.use_tiling
    assert torch.equal(encode_moments(vae, picture), whole)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 32, 64
    alone = encode_in_tiles(vae, picture)  # somebody's own tiling, as diffusers does it
    assert torch.equal(alone, encode_moments(vae, picture))
    difference, of_its_own = ((other - whole)[:, :4].abs().mean() for other in (tiled, alone))
    assert 0 < difference < 0.1 * whole[:, :4].std()
    assert difference < 0.3 * of_its_own


def test_a_mosaic_takes_blocks_from_all_over():
    map = torch.arange(40 * 64).view(1, 1, 40, 64)
    found = mosaic(map, 32)
    assert found.shape == (1, 1, 32, 32)
    rows, columns = found[0, 0, :, 0] // 64, found[0, 0, 0] % 64
    assert rows.tolist() == [*range(8), *range(11, 19), *range(21, 29), *range(32, 40)]
    assert columns[0] == 0 and columns[-1] == 63 and torch.equal(found[0, 0], 64 * rows[:, None] + columns)
    assert torch.equal(mosaic(map[:, :, :5], 64), map[:, :, :5])
    image = mosaic(map.repeat_interleave(2, 2).repeat_interleave(2, 3), 32, 2)  # of an image the same places
    assert torch.equal(image, found.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_large_images_alone_are_decoded_in_tiles(monkeypatch):
    pipe, calls = pipeline(), []
    decode_tiled = pipe.vae.tiled_decode
    monkeypatch.setattr(pipe.vae, "tiled_decode", lambda z, **more: calls.append(z.shape) or decode_tiled(z, **more))
    draw(pipe, height=64, width=64, num_inference_steps=1, output_type="uint8")
    assert calls == []
    monkeypatch.setattr("gspn_dit.inference.decoding._PIXELS_A_DECODE", 64 * 64)
    monkeypatch.setattr("gspn_dit.autoencoder.tiling.TILE_PIXELS", 32)
    draw(pipe, height=64, width=64, num_inference_steps=1, output_type="uint8")
    assert calls == []
    images = draw(pipe, height=64, width=80, num_inference_steps=1, output_type="pil")
    assert calls == [(1, 4, 32, 40)]
    assert isinstance(images[0], Image.Image) and images[0].size == (80, 64)


@pytest.mark.parametrize("most", [64, 128])
def test_tiles_fit_diffusers_and_leave_no_sliver(most):
    for length in range(most + 1, 12 * most, 5):
        side = tile_side(length, length, most)
        step = int(side * 0.75)
        assert side % 4 == 0 and most * 0.7 <= side <= most
        assert (length - 1) % step + 1 >= 0.35 * step  # how wide the last tile is
