"""Images to latents and back: the packaged VAEs, the command that trains them, and which VAEs are taken."""

import json

import pytest
import torch
from diffusers import UNet2DModel

from gspn_dit.data import decode, downsampling, encode_moments, load_vae, open_images, sample_posterior
from gspn_dit.errors import InputError
from gspn_dit.options import command
from gspn_dit.training import small_vae
from gspn_dit.weights import packaged


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
    assert (packaged("digits") / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size < 2_000_000
    assert downsampling(vae) == 4
    assert moments.shape == (500, 8, 8, 8)
    assert moments.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_packaged_vae_reconstructs_held_out_digits(vae, moments, held_out):
    latents = sample_posterior(vae.config, moments, torch.zeros(500, 4, 8, 8))
    decoded = decode(vae, latents)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == held_out.shape
    assert small_vae.psnr(error(decoded, held_out)) > 29
    blank = torch.full_like(held_out, int(held_out.float().mean()))
    assert error(decoded, held_out) < error(blank, held_out) / 15


def test_packaged_vae_gives_unit_latents_that_stand_noise(vae, moments, held_out):
    """A diffusion model's latents are a little off: the picture has to stand a fifth of a standard deviation."""
    generator = torch.Generator().manual_seed(0)
    latents = sample_posterior(vae.config, moments, torch.randn(500, 4, 8, 8, generator=generator))
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    assert abs(latents.mean().item()) < 0.2
    noisy = decode(vae, latents + 0.2 * torch.randn(latents.shape, generator=generator))
    assert small_vae.psnr(error(noisy, held_out)) > 26


@pytest.fixture(scope="module")
def photos():
    """Held-out crops of every photograph at 64 pixels, uint8 (16, 3, 64, 64)."""
    crops = open_images("photos", 64, split="test")
    return torch.stack([crops[i][0] for i in range(16)])


def test_photos_vae_reconstructs_held_out_crops_from_unit_latents(photos):
    assert (packaged("photos") / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size < 4_000_000
    vae = load_vae("photos")
    assert downsampling(vae) == 4
    moments = encode_moments(vae, photos)
    assert moments.shape == (16, 8, 16, 16)
    assert small_vae.psnr(small_vae.reconstruction_error(vae, photos)) > 25
    generator = torch.Generator().manual_seed(0)
    latents = sample_posterior(vae.config, moments, torch.randn(16, 4, 16, 16, generator=generator))
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    noisy = decode(vae, latents + 0.2 * torch.randn(latents.shape, generator=generator))
    assert small_vae.psnr(error(noisy, photos)) > 22


def test_photos_vae_takes_any_size_and_tiles(photos):
    """A picture decoded in tiles is the picture decoded at once, but for each tile's own normalisation."""
    vae = load_vae("photos")
    wide = torch.cat([photos[3], photos[3].flip(2)], dim=2)[None, :, :52]  # one picture, 52×128
    latents = sample_posterior(vae.config, encode_moments(vae, wide), torch.zeros(1, 4, 13, 32))
    whole = decode(vae, latents)
    assert whole.shape == wide.shape
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 64
    assert small_vae.psnr(error(decode(vae, latents), whole)) > 25


def test_a_linear_start_resamples_before_any_training(photos):
    torch.manual_seed(0)
    vae = small_vae.new_vae(small_vae.PhotoCrops()).eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1.0)
    assert small_vae.psnr(small_vae.reconstruction_error(vae, photos)) > 18


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


def test_posterior_is_sampled_anew_with_its_mean_and_deviation(vae):
    mean, deviation = torch.randn(4, 2, 2), torch.rand(4, 2, 2) + 0.1
    moments = torch.cat([mean, 2 * deviation.log()]).expand(20_000, -1, -1, -1)
    noise = torch.randn(20_000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = sample_posterior(vae.config, moments, noise) / vae.config.scaling_factor
    standard_error = deviation / 20_000**0.5
    assert ((latents.mean(0) - mean).abs() < 5 * standard_error).all()
    assert ((latents.std(0) - deviation).abs() < 5 * standard_error).all()


def test_the_training_command_prints_the_error_of_what_it_saves_and_repeats_itself(tmp_path, held_out, capsys):
    for name in ("first", "again"):
        arguments = ["--data", "digits", "--out", str(tmp_path / name), "--steps", "4", "--batch-size", "8"]
        command(small_vae.main, small_vae.Options, prog="small_vae", argv=arguments)
    said, *lines = capsys.readouterr().out.splitlines()
    assert said == lines.pop(2) == "computing in float32 (mixed_precision no)"
    weights = [(tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]
    assert lines[0].partition(": ")[2] == lines[2].partition(": ")[2]
    assert lines[1] == lines[3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first"]  # nothing temporary is left

    trained = load_vae(tmp_path / "first")
    measured = small_vae.reconstruction_error(trained, held_out)
    assert f"mean squared error {measured:.6f}, PSNR {small_vae.psnr(measured):.2f} dB" in lines[1]
    moments = encode_moments(trained, open_images("digits", 32).images[:300])
    latents = sample_posterior(trained.config, moments, torch.randn(300, 4, 8, 8))
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_the_training_command_never_writes_over_a_folder(tmp_path, capsys):
    (tmp_path / "precious").write_text("")
    with pytest.raises(SystemExit) as stopped:
        command(small_vae.main, small_vae.Options, prog="small_vae", argv=["--data", "digits", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "exists already" in capsys.readouterr().err


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
