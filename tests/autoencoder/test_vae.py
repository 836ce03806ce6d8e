"""Images to latents and back: the packaged VAEs, the command that trains them, and which VAEs are taken."""

import http.server
import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from PIL import Image

from gspn_dit.autoencoder import decode, downsampling, encode_moments, load_vae, sample_posterior
from gspn_dit.autoencoder.quality import latent_statistics, psnr, reconstruction_error
from gspn_dit.commands import SmallVAEOptions
from gspn_dit.data import open_images
from gspn_dit.demo import small_vae
from gspn_dit.errors import InputError
from gspn_dit.options import command
from gspn_dit.storage.packaged import PACKAGED_VAES


@pytest.fixture(scope="module")
def vae():
    return load_vae("digits")


@pytest.fixture(scope="module")
def held_out():
    return open_images("digits", 32, split="test").images


@pytest.fixture(scope="module")
def moments(vae, held_out):
    return encode_moments(vae, held_out)


def error(images, others):
    return (images.float() - others.float()).square().mean().item() / 255**2


def test_packaged_vae_is_small_and_four_times_down(vae, moments):
    assert (PACKAGED_VAES["digits"] / "diffusion_pytorch_model.safetensors").stat().st_size < 2_000_000
    assert downsampling(vae) == 4
    assert moments.shape == (500, 8, 8, 8)
    assert moments.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_packaged_vae_reconstructs_held_out_digits(vae, moments, held_out):
    latents = sample_posterior(vae.config, moments, torch.zeros(500, 4, 8, 8))
    decoded = decode(vae, latents)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == held_out.shape
    assert psnr(error(decoded, held_out)) > 29
    blank = torch.full_like(held_out, int(held_out.float().mean()))
    assert error(decoded, held_out) < error(blank, held_out) / 15


def test_packaged_vae_gives_unit_latents_that_stand_noise(vae, moments, held_out):
    """A diffusion model's latents are a little off: the picture has to stand a fifth of a standard deviation."""
    generator = torch.Generator().manual_seed(0)
    latents = sample_posterior(vae.config, moments, torch.randn(500, 4, 8, 8, generator=generator))
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    assert abs(latents.mean().item()) < 0.2
    noisy = decode(vae, latents + 0.2 * torch.randn(latents.shape, generator=generator))
    assert psnr(error(noisy, held_out)) > 26


@pytest.fixture(scope="module")
def photos():
    """Held-out crops of every photograph at 64 pixels, uint8 (16, 3, 64, 64)."""
    crops = open_images("photos", 64, split="test")
    return torch.stack([crops[i][0] for i in range(16)])


def test_photos_vae_reconstructs_held_out_crops_from_unit_latents(photos):
    assert (PACKAGED_VAES["photos"] / "diffusion_pytorch_model.safetensors").stat().st_size < 4_000_000
    vae = load_vae("photos")
    assert downsampling(vae) == 4
    moments = encode_moments(vae, photos)
    assert moments.shape == (16, 8, 16, 16)
    assert psnr(reconstruction_error(vae, [photos])) > 25
    generator = torch.Generator().manual_seed(0)
    latents = sample_posterior(vae.config, moments, torch.randn(16, 4, 16, 16, generator=generator))
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    noisy = decode(vae, latents + 0.2 * torch.randn(latents.shape, generator=generator))
    assert psnr(error(noisy, photos)) > 22


def test_photos_vae_takes_any_size_and_tiles(photos):
    """A picture decoded in tiles is the picture decoded at once, but for each tile's own normalisation."""
    vae = load_vae("photos")
    wide = torch.cat([photos[3], photos[3].flip(2)], dim=2)[None, :, :52]  # one picture, 52×128
    latents = sample_posterior(vae.config, encode_moments(vae, wide), torch.zeros(1, 4, 13, 32))
    whole = decode(vae, latents)
    assert whole.shape == wide.shape
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 64
    assert psnr(error(decode(vae, latents), whole)) > 25


def test_a_linear_start_resamples_before_any_training(photos):
    torch.manual_seed(0)
    vae = small_vae.new_vae(small_vae.PhotoCrops()).eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1.0)
    assert psnr(reconstruction_error(vae, [photos])) > 18


def test_crops_of_a_training_batch_have_equal_pixels_and_differ():
    torch.manual_seed(0)
    source = small_vae.PhotoCrops()
    batches = [source.batch(8) for _ in range(8)]
    assert {tuple(batch.shape) for batch in batches} == {(8, 3, 64, 64), (2, 3, 128, 128)}
    assert not any(torch.equal(batch[0], batch[1]) for batch in batches)


def test_decode_undoes_scaling_and_shift(vae, moments, held_out, monkeypatch):
    """Another scale and shift of the same latents, as SD3's VAE has, is another unit, not another picture."""
    few, zeros = moments[:8], torch.zeros(8, 4, 8, 8)
    picture = decode(vae, sample_posterior(vae.config, few, zeros))
    other = load_vae("digits")
    other.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    latents = sample_posterior(other.config, few, zeros)
    assert torch.allclose(latents, (few[:, :4] - 0.0609) * 1.5305, atol=1e-6)
    assert error(decode(other, latents), picture) < 1e-6


PER_CHANNEL = {"latents_mean": [0.5, -1.0, 0.25, 2.0], "latents_std": [2.0, 0.5, 1.5, 3.0]}


def test_numbers_for_each_channel_are_taken_off_and_put_back(vae, moments, held_out):
    """As diffusers does for SD-XL: (z - latents_mean) · scaling_factor / latents_std."""
    few, zeros = moments[:8], torch.zeros(8, 4, 8, 8)
    other = load_vae("digits")
    other.register_to_config(scaling_factor=0.25, **PER_CHANNEL)
    latents = sample_posterior(other.config, few, zeros)
    for channel, (mean, std) in enumerate(zip(*PER_CHANNEL.values(), strict=True)):
        expected = (few[:, channel] - mean) * 0.25 / std
        assert torch.allclose(latents[:, channel], expected, atol=1e-6)
    assert error(decode(other, latents), decode(vae, sample_posterior(vae.config, few, zeros))) < 1e-6


def test_latents_are_measured_as_they_are_drawn(vae, moments):
    other = load_vae("digits")
    other.register_to_config(scaling_factor=0.25, **PER_CHANNEL)
    for scaling in (vae.config, other.config):
        found = latent_statistics(scaling, moments.split(200))
        noise = torch.randn(20, 500, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        drawn = sample_posterior(scaling, moments, noise)
        assert found["images"] == 500
        assert found["mean"] == pytest.approx(drawn.mean().item(), abs=0.01)
        assert found["std"] == pytest.approx(drawn.std().item(), rel=0.01)
        assert found["channel_means"] == pytest.approx(drawn.mean(dim=(0, 1, 3, 4)).tolist(), abs=0.01)
        assert found["channel_stds"] == pytest.approx(drawn.std(dim=(0, 1, 3, 4)).tolist(), rel=0.01)


def vae_folder(folder, **changes):
    """The digits' VAE with other values in its config.json."""
    shutil.copytree(PACKAGED_VAES["digits"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scaling_factor": 0}, "scaling_factor=0 "),
        ({"scaling_factor": -1.0}, "scaling_factor=-1.0 "),
        ({"scaling_factor": float("nan")}, "scaling_factor=nan "),
        ({"scaling_factor": float("inf")}, "scaling_factor=inf "),
        ({"scaling_factor": None}, "scaling_factor=None "),
        ({"shift_factor": "1"}, "shift_factor='1' "),
        ({"latents_mean": [0, 0, 0, 0]}, "latents_std=None "),
        ({"latents_std": [1, 1, 1, 1]}, "latents_mean=None "),
        (PER_CHANNEL | {"latents_std": [1, 1, 1, 0]}, "latents_std="),
        (PER_CHANNEL | {"latents_mean": [1, 1, 1]}, r"latents_mean=\[1, 1, 1\] .* wanted 4 numbers"),
        (PER_CHANNEL | {"shift_factor": 0.5}, "both shift_factor and latents_mean"),
    ],
)
def test_a_vae_that_does_not_say_how_to_scale_its_latents_is_refused(tmp_path, changes, words):
    with pytest.raises(InputError, match=f"^vae='.*vae': .*{words}"):
        load_vae(vae_folder(tmp_path / "vae", **changes))


@pytest.mark.parametrize("channels", [(1, 3), (3, 4)])
def test_a_vae_of_other_images_than_rgb_is_refused(tmp_path, channels):
    given, taken = channels
    vae = AutoencoderKL(in_channels=given, out_channels=taken, norm_num_groups=4, block_out_channels=(8,))
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match=rf"^vae='.*vae': takes {given} channels and gives {taken}; wanted .* of RGB"):
        load_vae(tmp_path / "vae")


def test_posterior_is_sampled_anew_with_its_mean_and_deviation(vae):
    mean, deviation = torch.randn(4, 2, 2), torch.rand(4, 2, 2) + 0.1
    moments = torch.cat([mean, 2 * deviation.log()]).expand(20_000, -1, -1, -1)
    noise = torch.randn(20_000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = sample_posterior(vae.config, moments, noise) / vae.config.scaling_factor
    standard_error = deviation / 20_000**0.5
    assert ((latents.mean(0) - mean).abs() < 5 * standard_error).all()
    assert ((latents.std(0) - deviation).abs() < 5 * standard_error).all()


@pytest.mark.slow
def test_the_training_command_prints_the_error_of_what_it_saves_and_repeats_itself(tmp_path, held_out, capsys):
    for name in ("first", "again"):
        arguments = ["--data", "digits", "--out", str(tmp_path / name), "--steps", "4", "--batch-size", "8"]
        command(small_vae.main, SmallVAEOptions, prog="small_vae", argv=arguments)
    said, *lines = capsys.readouterr().out.splitlines()
    assert said == lines.pop(2) == "computing in float32 (mixed_precision no)"
    weights = [(tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]
    assert lines[0].partition(": ")[2] == lines[2].partition(": ")[2]
    assert lines[1] == lines[3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first"]  # nothing temporary is left

    trained = load_vae(tmp_path / "first")
    measured = reconstruction_error(trained, held_out.split(100))
    assert f"mean squared error {measured:.6f}, PSNR {psnr(measured):.2f} dB" in lines[1]
    moments = encode_moments(trained, open_images("digits", 32).images[:300])
    latents = sample_posterior(trained.config, moments, torch.randn(300, 4, 8, 8))
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_the_training_command_never_writes_over_a_folder(tmp_path, capsys):
    (tmp_path / "precious").write_text("")
    with pytest.raises(SystemExit) as stopped:
        command(small_vae.main, SmallVAEOptions, prog="small_vae", argv=["--data", "digits", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_a_vae_is_trained_on_any_folder_of_images(tmp_path, capsys):
    """At any depth and of any size; what cannot be read is named, and one that was not seen is scored."""
    draw, root = np.random.default_rng(0), tmp_path / "pictures"
    for number in range(12):
        blocks = draw.integers(0, 256, (6, 5 + number % 3, 3), dtype=np.uint8)
        (root / f"of {number % 2}" / "some").mkdir(parents=True, exist_ok=True)
        Image.fromarray(blocks.repeat(20, 0).repeat(20, 1)).save(root / f"of {number % 2}" / "some" / f"{number}.png")
    (root / "torn.png").write_bytes(b"torn")
    arguments = [
        "--data",
        str(root),
        "--image-size",
        "96",
        "--out",
        str(tmp_path / "vae"),
        "--steps",
        "2",
        "--batch-size",
        "2",
    ]
    command(small_vae.main, SmallVAEOptions, prog="small_vae", argv=arguments)
    printed = capsys.readouterr()
    assert "held-out images at 96 px, pixels in [0, 1]: mean squared error" in printed.out
    assert printed.err.count("unreadable image, left out: ") <= 1
    trained = load_vae(tmp_path / "vae")
    source = small_vae.FolderCrops(str(root), 96)
    assert {tuple(source.batch(8).shape) for _ in range(20)} == {(8, 3, 64, 64), (3, 3, 96, 96)}
    (_, held_out), seen = next(source.held_out()), source.images
    assert len(held_out) + len(seen) == 12 and seen.shape[1:] == (3, 96, 96)
    assert not any(torch.equal(a, b) for a in held_out for b in seen)
    assert f"PSNR {psnr(reconstruction_error(trained, [held_out])):.2f} dB" in printed.out
    statistics = latent_statistics(trained.config, [encode_moments(trained, seen)])
    assert statistics["std"] == pytest.approx(1, abs=0.1)


def test_a_crop_of_a_folders_image_is_a_part_of_it_at_about_its_scale(tmp_path):
    """In a picture whose colours give the place a crop of 64 px of 256 shows from an eighth of a side up to all."""
    ramp = np.linspace(0, 255, 512).round().astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.uint8(0)), axis=-1)
    for name in ("1.png", "2.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    torch.manual_seed(0)
    source = small_vae.FolderCrops(str(tmp_path), 256)
    crops = [source.batch(8)[:, :2].float() for _ in range(30)]
    share = torch.cat([(each.amax((2, 3)) - each.amin((2, 3))) / 255 for each in crops])
    assert (share[:, 0] - share[:, 1]).abs().max() < 0.03  # a square
    assert 0.10 < share.min() < 0.16 and share.max() > 0.9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "nowhere", "--image-size", "64"], "data='nowhere': wanted digits, photos, scenes or a folder"),
        (["--data", "."], "--image-size: missing; wanted a multiple of 4"),
        (["--data", ".", "--image-size", "66"], "--image-size=66: wanted a multiple of 4"),
        (["--data", "digits", "--image-size", "64"], "--image-size=64: wanted none: digits have theirs"),
        (["--data", ".", "--image-size", "64"], "data='.': wanted a folder of two images or more"),
    ],
)
def test_a_folder_to_train_a_vae_on_is_looked_at_first(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command(small_vae.main, SmallVAEOptions, prog="small_vae", argv=[*options, "--out", str(tmp_path / "vae")])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "vae").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has no repository but one, and in that no config.json."""

    def do_HEAD(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound" if self.path.startswith("/some/unet") else "RepoNotFound")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_hub_that_cannot_be_reached_is_said_to_be_at_once(monkeypatch, capfd):
    """And what is no hub's name, before it is asked; and what it has not."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there, nowhere = f"http://127.0.0.1:{server.server_port}", "http://127.0.0.1:9"
        for endpoint, name, words in (
            (nowhere, "nobody/no-such-vae", "no such folder, and the hub cannot be reached"),
            (nowhere, "no-such-vae", "no such folder, and no hub name, which is OWNER/NAME"),
            (nowhere, "some owner/vae", "no such folder, and no hub name"),
            (there, "nobody/no-such-vae", "the hub has no such repository"),
            (there, "some/unet", "that repository has no config.json"),
        ):
            monkeypatch.setattr(
                "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            )
            monkeypatch.setattr(
                "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE",
                endpoint + "/{repo_id}/resolve/{revision}/{filename}",
                raising=False,
            )
            began = time.monotonic()
            with pytest.raises(InputError, match=f"^vae='{name}': .*{words}"):
                load_vae(name)
            assert time.monotonic() - began < 5
        server.shutdown()
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_load_vae_says_what_to_give_instead(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for missing in ("nobody/no-such-vae", str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(InputError, match=r"config\.json and weights, or a hub name"):
            load_vae(missing)
    with pytest.raises(InputError, match=r"no readable config\.json"):
        load_vae(tmp_path)
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text(json.dumps({"_class_name": UNet2DModel.__name__}))
    with pytest.raises(InputError, match="UNet2DModel"):
        load_vae(unet)
    torn = tmp_path / "torn"
    load_vae("digits").save_pretrained(torn)
    weights = torn / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="torn"):
        load_vae(torn)
    weights.unlink()
    with pytest.raises(InputError, match="torn"):
        load_vae(torn)
