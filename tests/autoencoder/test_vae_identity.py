"""Which VAE latents are of: known by its weights, wherever it lies, in a store, in a run and in what is drawn of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from made.runs import list_checkpoints, make_run
from made.store import make_store
from made.training import config, options

from gspn_dit.autoencoder import decode, load_vae
from gspn_dit.autoencoder.vae import vae_record, vae_sha256
from gspn_dit.commands import ExportOptions, SampleOptions
from gspn_dit.config import Config, DataConfig
from gspn_dit.data import LatentStore
from gspn_dit.errors import InputError
from gspn_dit.inference.export import main as export
from gspn_dit.inference.loading import load_pipeline, load_transformer
from gspn_dit.inference.sample import main as sample
from gspn_dit.options import command, parse
from gspn_dit.training.diffusion import open_latents
from gspn_dit.training.loop import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def save_vae(folder, source="digits", changed="", **values):
    """A VAE in a folder, with noise on the weights whose names begin so, and other values in its config.json."""
    vae = load_vae(source)
    vae.register_to_config(**values)
    torch.manual_seed(0)
    for name, parameter in vae.named_parameters():
        if changed and name.startswith(changed):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    vae.save_pretrained(folder)
    return str(folder)


def warnings_of(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    """A store that says what the digits' VAE is, under a name that is no more."""
    folder = tmp_path_factory.mktemp("noted") / "store"
    return make_store(folder, vae="/gone/vae", vae_sha256=vae_sha256(load_vae("digits")))


def opened(store, vae, tmp_path, drawn=True):
    given = config(tmp_path / "run", store, "--data.vae", vae, "--training.sample_every", "1" if drawn else "0")
    return open_latents(given, LatentStore(store), torch.device("cpu"))


def test_a_stores_vae_goes_by_any_name(noted, tmp_path):
    copy, decoder, encoder = (save_vae(tmp_path / name, changed=name) for name in ("", "decoder", "encoder"))
    for name in ("digits", copy, decoder):
        for drawn in (True, False):
            vae, _, _, record = opened(noted, name, tmp_path, drawn)
            assert (vae is not None) == drawn
            assert record["sha256"]["encoder"] == vae_sha256(load_vae("digits"))["encoder"]
            assert vae is None or vae.config.scaling_factor == 1 / 12  # the store's, both ways
    for drawn in (True, False):
        with pytest.raises(InputError, match=r"^data\.vae=.*its weights are not those .* was encoded with, of '/gone"):
            opened(noted, encoder, tmp_path, drawn)
    assert opened(noted, "/gone/vae", tmp_path, drawn=False)[0] is None  # which nobody needs
    with pytest.raises(InputError, match="no such folder"):
        opened(noted, "/gone/vae", tmp_path)


def test_a_store_of_before_goes_by_its_vaes_name_and_says_the_way_on(store, tmp_path):
    assert opened(store, "digits", tmp_path)[3]["sha256"] == vae_sha256(load_vae("digits"))
    with pytest.raises(InputError, match=r"encoded by 'digits', .* write its name for `vae` into"):
        opened(store, save_vae(tmp_path / "copy"), tmp_path)


def test_paths_of_a_run_are_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("vae", "images", "digits"):
        Path(name).mkdir()
    data = DataConfig(source="images", vae="vae")
    assert (data.source, data.vae) == (str(tmp_path / "images"), str(tmp_path / "vae"))
    data = DataConfig(source="digits", vae="stabilityai/sd-vae-ft-ema")
    assert (data.source, data.vae) == ("digits", "stabilityai/sd-vae-ft-ema")
    given = parse(Config, ["--model.init-from", "images", "--evaluation.reference", "digits:test"], exit_on_error=False)
    assert (given.model.init_from, given.evaluation.reference) == (str(tmp_path / "images"), "digits:test")


@pytest.fixture
def trained(noted, tmp_path, monkeypatch):
    """A run of 4 steps, begun in the folder of its VAE, which it names by a relative path."""
    save_vae(tmp_path / "vae", scaling_factor=1 / 12)
    monkeypatch.chdir(tmp_path)
    train(config("run", noted, "--data.vae", "vae", "--training.max_steps", "4", "--training.sample_every", "4"))
    monkeypatch.chdir("/")
    return tmp_path / "run"


def draw(run, out, *more):
    command(
        sample,
        SampleOptions,
        prog="sample.py",
        argv=["--model", str(run), "--num-images", "2", "--npz", str(out), "--device", "cpu", *more],
    )
    return np.load(out)["arr_0"]


@pytest.mark.usefixtures("as_a_command_says_it")
def test_a_run_goes_on_and_is_drawn_wherever_its_vae_lies(trained, noted, tmp_path, capsys):
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert saved["data"]["vae"] == str(tmp_path / "vae")
    here = draw(trained, tmp_path / "here.npz")
    shutil.move(tmp_path / "vae", tmp_path / "moved")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        draw(trained, tmp_path / "there.npz")
    assert f"the run's vae='{tmp_path}/vae': no such folder" in (said := capsys.readouterr().err)
    assert "name that with --vae" in said
    there = draw(trained, tmp_path / "there.npz", "--vae", str(tmp_path / "moved"))
    assert np.array_equal(here, there) and warnings_of(capsys) == []
    load_transformer(trained)  # needs none

    def resume(vae, steps):
        given = config(trained, noted, "--data.vae", vae, "--training.max_steps", steps, "--resume", "auto")
        given.training.sample_every = 0
        train(given)

    resume(tmp_path / "moved", 6)
    assert f"data.vae '{tmp_path}/vae' → '{tmp_path}/moved'" in capsys.readouterr().out
    resume("digits", 8)  # the same weights again
    assert list_checkpoints(trained)[-1].name == "step-0000008"
    with pytest.raises(InputError, match=r"data\.vae=.*its weights are not those"):
        resume(save_vae(tmp_path / "other", changed="encoder"), 10)


def test_a_run_is_not_continued_with_latents_of_another_scale(trained, tmp_path):
    metadata = json.loads((list_checkpoints(trained)[-1] / "metadata.json").read_text())
    assert metadata["vae"]["scaling_factor"] == 1 / 12
    digits = vae_sha256(load_vae("digits"))
    other = make_store(tmp_path / "scaled", vae_sha256=digits, latents_mean=[1, 1, 1, 1], latents_std=[2, 2, 2, 2])
    with pytest.raises(InputError, match=r"^data\.source=.*latents_mean is \[1, 1, 1, 1\], and the run .* with None"):
        train(config(trained, other, "--resume", "auto", "--training.max_steps", "6"))
    noise = make_store(tmp_path / "noise", vae_sha256={"encoder": "0", "decoder": "0"})
    with pytest.raises(InputError, match=r"^data\.vae='digits': the run .* has '.*vae', and this is not the same"):
        train(config(trained, noise, "--resume", "auto", "--training.max_steps", "6"))


@pytest.mark.usefixtures("as_a_command_says_it")
@pytest.mark.parametrize(
    ("changed", "words"), [("decoder", "its decoder is another than that"), ("encoder", "its weights are not those")]
)
def test_another_vae_is_drawn_with_and_said(tmp_path, capsys, changed, words):
    run = make_run(tmp_path / "run")
    vae = load_vae(run / "vae")
    metadata = run / "checkpoints" / "step-0000002" / "metadata.json"
    record = vae_record("the first", vae.config, vae)
    metadata.write_text(json.dumps({"step": 2, "vae": record | {"scaling_factor": 0.5}}))
    other = save_vae(tmp_path / "other", run / "vae", changed)
    same, drawn = (draw(run, tmp_path / f"{i}.npz", "--vae", name) for i, name in enumerate((str(run / "vae"), other)))
    assert np.array_equal(same, drawn) == (changed == "encoder")
    said = warnings_of(capsys)
    assert len(said) == 3 and f"vae='{other}': {words}" in said[1] and "of 'the first'" in said[1]
    assert said[0] == said[2] and "scaling_factor 0.5 (its config.json has 0.18215)" in said[0]

    export(ExportOptions(str(run), str(tmp_path / "exported"), vae=other))
    assert words in warnings_of(capsys)[0]
    exported = load_pipeline(tmp_path / "exported")
    assert exported.vae.config.scaling_factor == 0.5
    assert vae_sha256(exported.vae) == vae_sha256(load_vae(other))
    assert warnings_of(capsys) == []
    back = load_pipeline(tmp_path / "exported", str(run / "vae"))  # an export's own VAE is what it was trained with
    assert words in warnings_of(capsys)[0]
    latents = torch.randn(1, 4, 8, 8)
    vae.register_to_config(scaling_factor=0.5)
    assert torch.equal(decode(back.vae, latents), decode(vae, latents))
    narrow = load_vae("digits")
    narrow = type(narrow).from_config({**narrow.config, "latent_channels": 8})
    narrow.save_pretrained(tmp_path / "narrow")
    for model in (run, tmp_path / "exported"):
        with pytest.raises(InputError, match="its latents have 8 channels, and the transformer takes 4"):
            load_pipeline(model, str(tmp_path / "narrow"))


def test_a_run_of_before_decodes_as_it_did(tmp_path):
    """Then numbers for each channel were not heeded, neither way."""
    run = make_run(tmp_path / "run")
    vae = load_vae(run / "vae")
    numbers = {"latents_mean": [1.0] * 4, "latents_std": [2.0] * 4}
    save_vae(run / "vae", run / "vae", **numbers)
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(decode(load_pipeline(run).vae, latents), decode(vae, latents))
    assert not torch.equal(decode(load_vae(run / "vae"), latents), decode(vae, latents))


@pytest.mark.usefixtures("as_a_command_says_it")
def test_an_export_of_before_decodes_as_it_did(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    vae = load_vae(run / "vae")
    export(ExportOptions(str(run), str(tmp_path / "exported")))
    save_vae(tmp_path / "exported" / "vae", run / "vae", latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    latents = torch.randn(1, 4, 8, 8)
    assert not torch.equal(decode(load_pipeline(tmp_path / "exported").vae, latents), decode(vae, latents))
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    del index["class_dropout"]
    (tmp_path / "exported" / "model_index.json").write_text(json.dumps(index))
    capsys.readouterr()
    assert torch.equal(decode(load_pipeline(tmp_path / "exported").vae, latents), decode(vae, latents))
    assert "latents_mean None (its config.json has [1.0, 1.0, 1.0, 1.0])" in warnings_of(capsys)[0]


def test_a_run_of_before_is_not_continued_with_numbers_that_it_did_not_heed(tmp_path):
    vae = save_vae(tmp_path / "vae", latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    train(config(tmp_path / "run", "digits", "--data.vae", vae, "--training.max_steps", "1"))
    metadata = list_checkpoints(tmp_path / "run")[-1] / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"vae": None}))
    with pytest.raises(InputError, match=r"latents_mean is \[1.0, 1.0, 1.0, 1.0\], and the run .* began with None"):
        train(config(tmp_path / "run", "digits", "--data.vae", vae, "--resume", "auto"))


@pytest.mark.usefixtures("as_a_command_says_it")
def test_training_on_images_says_what_is_odd_about_their_latents(tmp_path, capsys):
    vae = save_vae(tmp_path / "vae", scaling_factor=50.0)
    train(config(tmp_path / "run", "digits", "--data.vae", vae, "--training.max_steps", "1"))
    said = warnings_of(capsys)
    assert len(said) == 1 and "standard deviation" in said[0] and "scaling_factor 50" in said[0]
    train(config(tmp_path / "photos", "photos", "--data.vae", "digits", "--training.max_steps", "1"))
    assert any("gives these images back at" in line for line in warnings_of(capsys))


@pytest.mark.usefixtures("as_a_command_says_it")
def test_training_on_a_store_says_what_is_odd_about_its_latents(tmp_path, capsys):
    large = make_store(tmp_path / "store", images=600, reconstruction_psnr=6.6)
    train(parse(Config, options(tmp_path / "run", large, "--training.max_steps", "1"), exit_on_error=False))
    said = warnings_of(capsys)
    assert len(said) == 2 and "expects about 0 and 1" in said[0] and "at 6.6 dB" in said[1]
