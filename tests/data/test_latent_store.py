"""The latent store: what the encode command writes, how it goes on when killed, and what reading it shows."""

import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from made.faults import finished, start_command
from made.launched import WarmLaunch, kill_one_process, run_warm
from made.training import wait_until
from PIL import Image
from torch.utils.data import DataLoader

from gspn_dit.autoencoder import encode_moments, load_vae, sample_posterior
from gspn_dit.autoencoder.vae import vae_sha256
from gspn_dit.commands import EncodeOptions
from gspn_dit.data import LatentStore, is_latent_store, open_images
from gspn_dit.data import encode as encode_command
from gspn_dit.data.latent_store import verify, write_manifest, write_shard
from gspn_dit.errors import InputError
from gspn_dit.options import command

DIGITS = {
    "data": "digits",
    "vae": "digits",
    "image-size": 32,
    "split": "test",
    "shard-size": 200,
    "batch-size": 50,
    "num-workers": 0,
    "device": "cpu",
}


def as_arguments(options):
    return [str(part) for key, value in options.items() for part in (f"--{key}", value)]


def encode(out, **options):
    """Run the command in this process, on the held-out digits unless told otherwise."""
    arguments = as_arguments({**DIGITS, "out": out, **options})
    command(encode_command.main, EncodeOptions, prog="encode", argv=arguments)


def refused(capsys, out, **options):
    """The one line that the command ends with, at exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        encode(out, **options)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def checksums(folder):
    return [shard["sha256"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]


@pytest.fixture(scope="module")
def digits_store(tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "digits"
    encode(out, **{"horizontal-flip": "true"})
    return out


@pytest.fixture
def copied_store(digits_store, tmp_path):
    """A copy to damage."""
    for path in digits_store.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.slow
def test_store_holds_the_moments_of_every_image_and_of_its_mirror_image(digits_store):
    store, images, vae = LatentStore(digits_store), open_images("digits", 32, split="test"), load_vae("digits")
    assert is_latent_store(digits_store)
    assert len(store) == len(images) == 500
    assert [store.label(index) for index in range(500)] == images.labels.tolist()
    chosen = [0, 199, 200, 399, 400, 499]  # both ends of every shard
    direct = encode_moments(vae, images.images[chosen])
    mirrored = encode_moments(vae, images.images[chosen].flip(-1))
    for row, index in enumerate(chosen):
        moments, label = store[index]
        assert moments.dtype == torch.float32
        assert label == images[index][1]
        torch.testing.assert_close(moments, direct[row], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(store.moments(index, flip=True), mirrored[row], atol=2e-3, rtol=2e-3)


def test_manifest_says_what_a_reader_needs(digits_store):
    store = LatentStore(digits_store)
    assert store.class_names == list("0123456789")
    assert (store.latent_channels, store.latent_size, store.image_size) == (4, (8, 8), 32)
    assert store.vae == "digits"
    assert store.scaling_factor == load_vae("digits").config.scaling_factor
    assert store.shift_factor is None
    assert store.manifest["split"] == "test"
    assert [shard["count"] for shard in store.manifest["shards"]] == [200, 200, 100]
    assert store.manifest["class_counts"] == [50] * 10
    with pytest.raises(IndexError):
        store[500]
    with pytest.raises(IndexError):
        store[-1]


@pytest.mark.slow
def test_store_is_mapped_not_read(tmp_path):
    """Opening 65 MB of latents brings in almost nothing, and reading them all, by workers too, copies almost nothing:
    private memory stays far below the store's size in the process that opened it and in each of its workers."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    settings = {
        "data": "made",
        "class_names": ["one"],
        "image_size": 512,
        "flipped": False,
        "vae": "made",
        "scaling_factor": 1.0,
        "shift_factor": None,
    }
    moments = torch.zeros(100, 8, 64, 64, dtype=torch.float16)
    names = [f"shard-{number:05d}.safetensors" for number in range(10)]
    for name in names:
        write_shard(tmp_path / name, moments, None, torch.zeros(100, dtype=torch.int64), [])
    write_manifest(tmp_path, settings, names)
    program = (
        "import sys; from gspn_dit.data.latent_store import LatentStore\n"
        "from torch.utils.data import DataLoader, Dataset\n"
        "def kilobytes(kind):\n"
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(kind))\n"
        "class Growth(Dataset):\n"
        "    def __getitem__(self, i):\n"
        "        before = kilobytes('RssAnon')\n"
        "        assert all(store[j][0].shape == (8, 64, 64) for j in range(1000))\n"
        "        return kilobytes('RssAnon') - before\n"
        "    def __len__(self): return 2\n"
        "before = kilobytes('VmRSS'); store = LatentStore(sys.argv[1]); print(kilobytes('VmRSS') - before)\n"
        "print(Growth()[0])\n"
        "for grown in DataLoader(Growth(), batch_size=1, num_workers=2): print(int(grown))"
    )
    output = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    opened, *read = (int(line) * 1024 for line in output.stdout.split())
    assert opened < 10e6
    assert len(read) == 3 and max(read) < 15e6 < 10 * moments.nbytes


def test_store_is_read_by_workers_and_survives_pickling(digits_store):
    store = LatentStore(digits_store)
    store[0]  # mapped before the workers are forked
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy[321][0], store[321][0])
    assert len(pickle.dumps(store)) < 20_000  # latents are not carried along
    batches = list(DataLoader(store, batch_size=100, num_workers=2))
    assert torch.equal(torch.cat([labels for _, labels in batches]), open_images("digits", 32, split="test").labels)
    assert torch.equal(batches[3][0][21], store[321][0])


MANY = {"shard-size": 5, "batch-size": 5}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """100 shards, encoded by one process on one thread: a convolution's last bits follow the number of threads."""
    out, threads = tmp_path_factory.mktemp("latents") / "unbroken", torch.get_num_threads()
    torch.set_num_threads(1)
    encode(out, **MANY)
    torch.set_num_threads(threads)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_killed_encoding_goes_on_with_any_number_of_processes_and_ends_the_same(
    tmp_path, unbroken, capsys, before, after
):
    killed = tmp_path / "killed"
    arguments = as_arguments({**DIGITS, "out": killed, **MANY})

    def well_begun():
        return len(list(killed.glob("shard-*"))) >= 4

    if before == 1:
        process = start_command("gspn_dit.data.encode:main", EncodeOptions, arguments)
        wait_until(well_begun)
        process.kill()
        assert finished(process) == -signal.SIGKILL
    else:
        kill_one_process(WarmLaunch(2, encode_command.__file__, *arguments), 1, well_begun)
    assert not is_latent_store(killed)
    for reader in (LatentStore, lambda folder: open_images(folder, 32)):
        with pytest.raises(InputError, match=r"to finish .*--data digits --vae digits --image-size 32 --out .*killed`"):
            reader(killed)
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("shard-*.safetensors")}
    assert 4 <= len(kept) < 100

    if after == 1:
        torch.set_num_threads(1)  # as `unbroken`
        capsys.readouterr()
        encode(killed, **MANY)
        said = "".join(capsys.readouterr())
    else:
        said = run_warm(2, encode_command.__file__, *arguments)
    assert "500 images in 100 shards" in said
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert checksums(killed) == checksums(unbroken)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (killed, unbroken)]
    assert manifests[0] == manifests[1]
    assert not list(killed.glob("*.tmp"))


def test_an_encoding_is_not_continued_with_other_settings(digits_store, tmp_path, capsys):
    flip = {"horizontal-flip": "true"}
    before = checksums(digits_store)
    assert "split='train'" in refused(capsys, digits_store, split="train", **flip)
    assert "flipped=False" in refused(capsys, digits_store)
    assert "--shard-size=100" in refused(capsys, digits_store, **flip, **{"shard-size": 100})
    encode(digits_store, **flip)  # the same once more: nothing to do
    assert checksums(digits_store) == before
    (tmp_path / "thesis.tex").write_text("")
    assert "no latent store" in refused(capsys, tmp_path)


def test_verify_names_the_shard_with_a_flipped_byte_and_the_missing_one(copied_store, capsys):
    check = ["--verify", str(copied_store)]
    command(encode_command.main, EncodeOptions, prog="encode", argv=check)
    assert "all 500 images" in capsys.readouterr().out

    path = copied_store / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    LatentStore(copied_store)  # opening does not read the latents
    (copied_store / "shard-00002.safetensors").unlink()
    with pytest.raises(SystemExit) as stopped:
        command(encode_command.main, EncodeOptions, prog="encode", argv=check)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "shard-00001.safetensors has changed" in line
    assert "shard-00002.safetensors is missing" in line
    assert "shard-00000" not in line

    encode(copied_store, **{"horizontal-flip": "true"})  # finishing anew brings the missing one back ...
    with pytest.raises(InputError, match=r"shard-00001\.safetensors has changed"):  # ... and hides no damage
        verify(copied_store)
    path.unlink()
    encode(copied_store, **{"horizontal-flip": "true"})
    assert verify(copied_store) == 500


def test_verify_finds_a_manifest_that_has_changed(copied_store):
    path = copied_store / "manifest.json"
    scale = json.dumps(LatentStore(copied_store).scaling_factor)
    path.write_text(path.read_text().replace(scale, scale[:-1] + "1"))
    with pytest.raises(InputError, match=r"manifest\.json has changed .*scaling_factor"):
        verify(copied_store)


def test_opening_finds_missing_and_torn_shards(copied_store):
    path = copied_store / "shard-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"shard-00001\.safetensors has \d+ bytes instead of \d+; delete it"):
        LatentStore(copied_store)
    path.unlink()
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is missing"):
        LatentStore(copied_store)
    encode(copied_store, **{"horizontal-flip": "true"})  # the remedy that the message gives
    assert path.read_bytes() == content
    path.write_bytes(bytes(8) + content[8:])
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is damaged"):
        LatentStore(copied_store)[250]


def test_labels_outside_the_classes_are_found(copied_store):
    path = copied_store / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": ["0", "1"]}))
    with pytest.raises(InputError, match=r"labels outside 0 … 1"):
        LatentStore(copied_store)[499]


def test_manifests_that_cannot_be_read_stop_with_a_remedy(copied_store):
    path = copied_store / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        LatentStore(copied_store)
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match="damaged"):
        LatentStore(copied_store)


def test_flips_are_asked_for_when_encoding(tmp_path):
    encode(tmp_path / "plain")
    with pytest.raises(InputError, match="--horizontal-flip true"):
        LatentStore(tmp_path / "plain").moments(0, flip=True)


def test_bad_options_stop_before_any_work(tmp_path, capsys):
    out = tmp_path / "out"
    assert "--image-size=30" in refused(capsys, out, data="photos", **{"image-size": 30})
    assert "--vae" in refused(capsys, out, vae="null")
    assert "device='gpu'" in refused(capsys, out, device="gpu")
    assert "--batch-size=0" in refused(capsys, out, **{"batch-size": 0})
    assert "--split='validation'" in refused(capsys, out, split="validation")
    assert "error: --data='" in (line := refused(capsys, out, data=tmp_path / "nowhere", split="train"))
    assert "no such folder" in line
    assert not out.exists()


def test_shards_without_a_readable_image_leave_no_gap(tmp_path, capsys):
    root = tmp_path / "images"
    (root / "only").mkdir(parents=True)
    for name in "abcdef":
        (root / "only" / f"{name}.png").write_bytes(b"torn")
    few = {"data": root, "split": "train", "shard-size": 2}
    assert "none of its 6 images can be read" in refused(capsys, tmp_path / "none", **few)
    Image.new("RGB", (40, 40), "white").save(root / "only/b.png")
    Image.new("RGB", (40, 40), "gray").save(root / "only/f.png")
    encode(tmp_path / "two", **few)
    store = LatentStore(tmp_path / "two")
    assert len(store) == 2
    white = encode_moments(load_vae("digits"), torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))[0]
    torch.testing.assert_close(store[0][0], white, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(store[1][0], white, atol=0.1)
    assert [Path(path).name for path in store.manifest["skipped"]] == ["a.png", "c.png", "d.png", "e.png"]


def vae_folder(folder, source="digits", noise=0.0, of="", **changes):
    """A packaged VAE in a folder, with other values in its config.json, or noise on weights that begin with `of`."""
    vae = load_vae(source)
    vae.register_to_config(**changes)
    torch.manual_seed(0)
    for name, parameter in vae.named_parameters():
        parameter.add_(noise * torch.randn(parameter.shape) * name.startswith(of))
    vae.save_pretrained(folder)
    return str(folder)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


PER_CHANNEL = {"latents_mean": [0.5, -1.0, 0.25, 2.0], "latents_std": [2.0, 0.5, 1.5, 3.0]}


def test_a_store_says_what_its_latents_are_like(digits_store, capsys):
    """Mean and spread as they are learned, the pictures they give back, and by which weights."""
    store, manifest = LatentStore(digits_store), manifest_of(digits_store)
    moments = torch.stack([store.moments(i) for i in range(500)])
    drawn = sample_posterior(store, moments, torch.randn(500, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    found = manifest["latent_statistics"]
    assert found["images"] == 500
    assert (found["mean"], found["std"]) == pytest.approx((drawn.mean().item(), drawn.std().item()), abs=0.01)
    assert 26 < manifest["reconstruction_psnr"] < 34
    assert store.vae_sha256 == manifest["vae_sha256"] == vae_sha256(load_vae("digits"))
    (digits_store / "manifest.json").unlink()
    capsys.readouterr()
    encode(digits_store, **{"horizontal-flip": "true"})  # what a run that was cut before its end does
    assert manifest_of(digits_store) == manifest
    printed = capsys.readouterr()
    wanted = f"mean {found['mean']:g}, standard deviation {found['std']:g}; a few images come back at "
    assert wanted + f"{manifest['reconstruction_psnr']:.1f} dB" in printed.out
    assert "warning" not in printed.err


@pytest.mark.usefixtures("as_a_command_says_it")
@pytest.mark.parametrize("scale", [0.01, 50.0])
def test_latents_that_no_model_expects_are_said(tmp_path, capsys, scale):
    encode(tmp_path / "store", vae=vae_folder(tmp_path / "vae", scaling_factor=scale))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and "standard deviation" in said[0] and f"config.json (scaling_factor {scale})" in said[0]
    std = manifest_of(tmp_path / "store")["latent_statistics"]["std"]
    assert std == pytest.approx(scale / load_vae("digits").config.scaling_factor, rel=0.05)


@pytest.mark.usefixtures("as_a_command_says_it")
def test_pictures_that_a_vae_cannot_show_are_said(tmp_path, capsys):
    draw, root = np.random.default_rng(0), tmp_path / "images" / "noise"
    root.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / f"{number}.png")
    encode(tmp_path / "store", data=root.parent, split="train")
    assert "gives these images back at" in (said := capsys.readouterr().err) and "small-vae --data FOLDER" in said
    assert manifest_of(tmp_path / "store")["reconstruction_psnr"] < 12


def test_numbers_for_each_channel_are_kept_and_heeded(tmp_path):
    vae = vae_folder(tmp_path / "vae", scaling_factor=0.25, **PER_CHANNEL)
    encode(tmp_path / "store", vae=vae)
    store = LatentStore(tmp_path / "store")
    assert (store.latents_mean, store.latents_std) == tuple(PER_CHANNEL.values())
    few = torch.stack([store.moments(i) for i in range(4)])
    for scaling in (store, load_vae(vae).config):
        latents = sample_posterior(scaling, few, torch.zeros(4, 4, 8, 8))
        expected = (few[:, 1] + 1.0) * 0.25 / 0.5
        torch.testing.assert_close(latents[:, 1], expected)


def of_format_1(store):
    """Make a store one of format 1, whose manifest and encode.json know no extras."""
    for name in ("manifest.json", "encode.json"):
        content = json.loads((store / name).read_text())
        assert content.pop("extras") is None
        if name == "manifest.json":
            assert content["format"] == 2
            content["format"] = 1
        (store / name).write_text(json.dumps(content))


def test_a_store_of_format_1_is_read_verified_and_continued(digits_store, copied_store):
    of_format_1(copied_store)
    old, new = LatentStore(copied_store), LatentStore(digits_store)
    assert (len(old), old.extras, old.condition_names) == (500, {}, ("class_labels",))
    for index in (0, 250, 499):
        was, now = old.sample(index, flip=True), new.sample(index, flip=True)
        assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)
    assert verify(copied_store) == 500
    shards = checksums(digits_store)
    (copied_store / "shard-00001.safetensors").unlink()
    encode(copied_store, **{"horizontal-flip": "true"})
    assert checksums(copied_store) == shards
    assert manifest_of(copied_store) == manifest_of(digits_store), "it is of format 2 from now on"
    assert verify(copied_store) == 500


def test_a_store_of_before_reads_as_it_did(copied_store):
    """Its manifest knows no numbers for each channel and no weights."""
    of_format_1(copied_store)
    manifest = manifest_of(copied_store)
    for key in ("latents_mean", "latents_std", "vae_sha256", "exif_orientation", "latent_statistics"):
        manifest.pop(key)
    (copied_store / "manifest.json").write_text(json.dumps(manifest))
    store = LatentStore(copied_store)
    assert (store.latents_mean, store.latents_std, store.vae_sha256) == (None, None, None)
    moments = store.moments(3)
    plain = moments[:4] * store.scaling_factor
    assert torch.equal(sample_posterior(store, moments, torch.zeros(4, 8, 8)), plain)


def test_an_encoding_goes_on_with_the_same_vae_in_another_place(tmp_path, capsys):
    first = vae_folder(tmp_path / "first")
    encode(tmp_path / "store", vae=first)
    (tmp_path / "store" / "shard-00001.safetensors").unlink()
    shutil.move(first, tmp_path / "second")
    encode(tmp_path / "store", vae=tmp_path / "second")
    assert verify(tmp_path / "store") == 500
    assert manifest_of(tmp_path / "store")["vae"] == first  # as it was begun
    decoder = vae_folder(tmp_path / "decoder", noise=0.1, of="decoder")
    encode(tmp_path / "store", vae=decoder)  # gives the same latents
    other = vae_folder(tmp_path / "other", noise=0.1, of="encoder")
    assert "its weights are not those that" in refused(capsys, tmp_path / "store", vae=other)
    begun = json.loads((tmp_path / "store" / "encode.json").read_text())
    begun.pop("vae_sha256")  # one of before
    (tmp_path / "store" / "encode.json").write_text(json.dumps(begun))
    assert "vae=" in refused(capsys, tmp_path / "store", vae=tmp_path / "second")


def test_exif_orientations_are_counted_and_applied_if_asked(tmp_path, capsys):
    draw, root = np.random.default_rng(0), tmp_path / "images" / "phone"
    root.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    for number in range(4):
        Image.fromarray(pixels).save(root / f"{number}.png", **({"exif": exif} if number else {}))
    few = {"data": root.parent, "split": "train", "shard-size": 2, "num-workers": 0}
    encode(tmp_path / "store", **few)
    assert "3 images have an EXIF orientation: left as they lie; --exif-orientation true" in capsys.readouterr().out
    encode(tmp_path / "turned", **few, **{"exif-orientation": "true"})
    assert "3 images have an EXIF orientation: turned" in capsys.readouterr().out
    stores = [LatentStore(tmp_path / name) for name in ("store", "turned")]
    assert [store.manifest["exif_tagged"] for store in stores] == [3, 3]
    expected = encode_moments(load_vae("digits"), torch.from_numpy(pixels).permute(2, 0, 1)[None].flip((2, 3)))[0]
    assert torch.equal(stores[0].moments(0), stores[1].moments(0))
    torch.testing.assert_close(stores[1].moments(1), expected, atol=2e-3, rtol=2e-3)
    assert "--exif-orientation=True" in refused(capsys, tmp_path / "store", **few, **{"exif-orientation": "true"})


@pytest.fixture(scope="module")
def sd_vae(tmp_path_factory):
    """Stable Diffusion's VAE at random weights, its config as the published ones are: without a shift_factor."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=256,
        scaling_factor=0.18215,
    )
    folder = tmp_path_factory.mktemp("sd") / "vae"
    vae.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["shift_factor"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_stable_diffusions_vae_encodes_an_image_folder(sd_vae, tmp_path, capsys, monkeypatch):
    root = tmp_path / "images"
    draw = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(root / name)
    (root / "cat/2.png").write_bytes((root / "cat/2.png").read_bytes()[:3000])
    monkeypatch.chdir(tmp_path)
    encode("store", data="images", vae=sd_vae, split="train", **{"image-size": 64, "shard-size": 3, "num-workers": 1})

    printed = capsys.readouterr()
    assert "cat/2.png" in printed.out + printed.err
    assert "3 images in 2 shards, 1 unreadable files left out" in printed.out
    monkeypatch.chdir("/")
    store = LatentStore(tmp_path / "store")
    assert [Path(path).name for path in store.manifest["skipped"]] == ["2.png"]
    assert [store.label(index) for index in range(len(store))] == [0, 1, 1]
    assert store.class_names == ["cat", "dog"]
    assert store.latent_size == (8, 8)
    assert (store.scaling_factor, store.shift_factor) == (0.18215, None)

    vae = load_vae(store.vae)
    assert sum(parameter.numel() for parameter in vae.parameters()) == pytest.approx(83.7e6, abs=0.05e6)
    images = open_images(root, 64)
    posterior = vae.encode(torch.stack([images[index][0] for index in (0, 2, 3)]) / 127.5 - 1).latent_dist
    expected = torch.cat([posterior.mean, posterior.logvar], dim=1)
    torch.testing.assert_close(torch.stack([moments for moments, _ in store]), expected, atol=1e-3, rtol=2e-3)
