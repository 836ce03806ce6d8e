"""Published DiT and SiT draw here what their authors' code draws, by every command, from files, folders and the hub."""

import itertools
import json
import logging
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from made.published import as_of_dits_code, diffusers_dit, dit_state_dict, save_dit_pipeline, sit_state_dict
from made.runs import make_run, tiny_vae

from gspn_dit import GSPNDiTPipeline
from gspn_dit.commands import ExportOptions, SampleOptions
from gspn_dit.errors import InputError
from gspn_dit.inference.export import main as export
from gspn_dit.inference.loading import find_checkpoint, is_of_others, load_class_names, load_pipeline, load_transformer
from gspn_dit.inference.published import VAE
from gspn_dit.inference.sample import main as sample
from gspn_dit.models import create_model
from gspn_dit.training.diffusion import start_from


def noise(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a VAE, a DiT's and a SiT's file, and a DiTPipeline with the 1,000 classes that guidance has."""
    folder = tmp_path_factory.mktemp("published")
    tiny_vae().save_pretrained(folder / "vae")
    torch.save(dit_state_dict(diffusers_dit()), folder / "DiT.pt")
    torch.save({"ema": sit_state_dict(diffusers_dit())}, folder / "SiT.pt")
    torch.save(dit_state_dict(diffusers_dit(out_channels=4)), folder / "half.pt")
    save_dit_pipeline(folder / "pipeline", diffusers_dit(1000))
    return folder


@pytest.fixture
def hub(place, tmp_path, monkeypatch):
    """The hub's cache, with a DiTPipeline, a repository of files, and the VAE that goes with them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, source in (("some/DiT", "pipeline"), ("some/files", "."), (VAE, "vae")):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(place / source, repository / "snapshots" / ("0" * 40))
    return tmp_path / "hub"


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_pipeline_of_diffusers_draws_diffusers_images(tmp_path, guidance_scale):
    theirs = save_dit_pipeline(tmp_path, diffusers_dit(1000), safe_serialization=False)  # as DiT was published
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 4, "output_type": "np"}
    expected = theirs([3, 999], generator=noise(), **options).images
    for pipe in (load_pipeline(tmp_path), GSPNDiTPipeline.from_pretrained(tmp_path)):
        pipe.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(pipe([3, 999], generator=noise(), **options).images, expected, atol=1.5 / 255)
        assert isinstance(pipe.scheduler, DDIMScheduler)
        assert (pipe.config.guidance_scale, pipe.config.num_inference_steps) == (4, 50)
    assert expected.std() > 0.02


def test_classes_of_diffusers_go_by_their_first_word(place, tmp_path):
    pipe = load_pipeline(place / "pipeline")
    assert pipe.class_ids(["animal 7", 8]) == [7, 8]
    shutil.copytree(place / "pipeline", tmp_path / "two")
    index = json.loads((tmp_path / "two" / "model_index.json").read_text())
    index["id2label"] |= {"2": "crane, bird", "4": "crane, machine"}
    (tmp_path / "two" / "model_index.json").write_text(json.dumps(index))
    names = load_class_names(tmp_path / "two")
    assert names[1:5] == ["animal 1", "crane, bird", "animal 3", "crane, machine"]


def test_a_sit_is_drawn_by_the_published_ode(place):
    """dx/dt = v(x, t) from noise at t = 0 to data at t = 1, by Euler's steps (SiT, arXiv 2401.08740)."""
    pipe = load_pipeline(place / "SiT.pt", str(place / "vae"))
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    pipe.set_progress_bar_config(disable=True)
    labels, steps = torch.tensor([0, 9]), 5
    options = {"guidance_scale": 1, "num_inference_steps": steps, "output_type": "latent"}
    ours = pipe(labels.tolist(), generator=noise(), **options).images
    network = as_of_dits_code(diffusers_dit())
    x = start = torch.randn(2, 4, 8, 8, generator=noise())
    with torch.no_grad():
        for step in range(steps):
            t = torch.full((2,), step / steps)
            x = x + network(x, timestep=t, class_labels=labels).sample[:, :4] / steps
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=0)
    assert (x - start).abs().max() > 0.1


def test_weights_alone_get_what_their_scripts_have(place):
    for name, scheduler in (("DiT.pt", DDPMScheduler), ("SiT.pt", FlowMatchEulerDiscreteScheduler)):
        pipe = GSPNDiTPipeline.from_pretrained(place / name, vae=tiny_vae(), num_inference_steps=20)
        assert isinstance(pipe.scheduler, scheduler)
        assert (pipe.config.guidance_scale, pipe.config.num_inference_steps) == (4, 20)
        assert pipe.latent_size() == (8, 8)
    transformer = place / "pipeline" / "transformer"
    pipe = load_pipeline(transformer, str(place / "vae"))
    assert isinstance(pipe.scheduler, DDPMScheduler) and pipe.config.num_inference_steps == 250
    assert load_class_names(transformer) is None and find_checkpoint(transformer) is None
    weights = load_transformer(place / "pipeline").state_dict()
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in load_transformer(transformer).state_dict().items()
    )


def test_weights_without_a_vae_say_so(place):
    with pytest.raises(InputError, match=rf"^model='.*SiT.pt': there is no VAE with it, and vae='{VAE}': .*--vae"):
        load_pipeline(place / "SiT.pt")


@pytest.mark.usefixtures("as_a_command_says_it")
def test_sample_draws_from_a_file_and_says_what_it_takes(place, hub, tmp_path, capsys):
    file, out = str(place / "SiT.pt"), tmp_path / "images"
    sample(SampleOptions(file, num_images=2, num_inference_steps=2, out=f"{out}/", device="cpu"))
    assert (out / "000001.png").is_file()
    assert json.loads((out / "settings.json").read_text())["guided_channels"] == 3
    said = capsys.readouterr().err.splitlines()
    what = "2 blocks of 192, 10 classes, 8 × 8 latents; velocity; variance channels dropped"
    assert f"{file}: SiT's own checkpoint, its ema: {what}" in said
    assert f"{file}: no VAE with it, {VAE} decodes" in said


@pytest.mark.usefixtures("hub")
def test_the_hub_has_what_folders_have(place):
    here, there = (load_pipeline(name).transformer.state_dict() for name in (place / "pipeline", "some/DiT"))
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert GSPNDiTPipeline.from_pretrained("some/DiT").class_ids(["animal 7"]) == [7]
    assert load_class_names("some/DiT")[7] == "animal 7"
    assert load_transformer("some/files/SiT.pt").config.time_embedding == "sit"
    for name, words in (
        ("some/other", "no such folder, and the hub cannot be reached"),
        ("some/files/other.pt", "no such folder, and the hub cannot be reached"),
        ("other", "no such folder, and no hub name"),
    ):
        with pytest.raises(InputError, match=f"^model=.*{words}.*weights of DiT or SiT"):
            load_pipeline(name)


@pytest.mark.parametrize("name", ["SiT.pt", "pipeline"])
def test_export_makes_a_folder_of_published_weights(place, tmp_path, name):
    vae = None if name == "pipeline" else str(place / "vae")
    export(ExportOptions(str(place / name), str(tmp_path / "ours"), vae))
    options = {"num_inference_steps": 2, "output_type": "latent"}
    pipes = load_pipeline(place / name, vae), load_pipeline(tmp_path / "ours")
    first, second = (pipe([3, 9], generator=noise(), **options).images for pipe in pipes)
    assert torch.equal(first, second)
    assert pipes[0].config.class_names == pipes[1].config.class_names
    _, front, text = (tmp_path / "ours" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "gspn-dit"
    assert f"Converted by `gspn-dit export` from `{name}`; its licence is that of those weights." in text
    assert "samples.png" not in text and not (tmp_path / "ours" / "samples.png").exists()
    assert "DiTTransformer2DModel" not in (tmp_path / "ours" / "model_index.json").read_text()


def test_export_is_told_what_a_file_does_not_say(place, tmp_path):
    vae = str(place / "vae")
    with pytest.raises(InputError, match="--convention dit or --convention sit"):
        export(ExportOptions(str(place / "half.pt"), str(tmp_path / "ours"), vae))
    export(ExportOptions(str(place / "half.pt"), str(tmp_path / "ours"), vae, convention="sit"))
    assert load_transformer(tmp_path / "ours").config.time_embedding == "sit"
    with pytest.raises(InputError, match="convention='sit': only a file of weights"):
        export(ExportOptions(str(make_run(tmp_path / "run")), str(tmp_path / "again"), convention="sit"))


def test_a_training_begins_with_published_weights(place):
    """Of other classes, too; but only in a model whose times are embedded as theirs were."""
    model = create_model("dit-ti-2", depth=2, sample_size=8, num_classes=3, out_channels=4, time_embedding="sit")
    said = start_from(model, str(place / "SiT.pt"), ["a", "b", "c"])
    assert said == f"{place / 'SiT.pt'} has 10 classes, the data 3: new label rows for 3"
    theirs = load_transformer(place / "SiT.pt").state_dict()
    assert torch.equal(model.final_layer.linear.weight, theirs["final_layer.linear.weight"])
    other = create_model("dit-ti-2", depth=2, sample_size=8, num_classes=10, out_channels=4)
    with pytest.raises(InputError, match=r"^model.init_from=.*time_embedding sit.*overrides '{time_embedding: sit}'"):
        start_from(other, str(place / "SiT.pt"), list("abcdefghij"))


def test_another_projects_pipeline_is_refused_by_its_name(place, hub, tmp_path):
    """On the hub by its model_index.json alone: nothing else of it is there to be read."""
    index = json.dumps({"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]})
    snapshot = tmp_path / "hub" / "models--some--PixArt" / "snapshots" / ("0" * 40)
    for folder in (tmp_path / "pixart", snapshot, snapshot.parents[1] / "refs"):
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text(index)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    words = "it is a PixArtAlphaPipeline; wanted a GSPNDiTPipeline, or a DiTPipeline of diffusers$"
    for name in (tmp_path / "pixart", "some/PixArt"):
        for load in (load_pipeline, load_transformer, load_class_names, GSPNDiTPipeline.from_pretrained):
            with pytest.raises(InputError, match=words):
                load(str(name))


def test_damaged_folders_are_refused_in_one_line(place, tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"^model=.*not a run"):
        find_checkpoint(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "model_index.json").write_text(content)
        for load in (is_of_others, load_pipeline, load_class_names, load_transformer):
            with pytest.raises(InputError, match=r"^model=.*: its model_index.json cannot be read; download it again$"):
                load(tmp_path)
        with pytest.raises(InputError, match=r"^its model_index.json cannot be read"):
            GSPNDiTPipeline.from_pretrained(tmp_path)


def test_a_file_takes_what_from_pretrained_takes_elsewhere(place):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=0.13, shift_factor=0.1)
    dtypes = {"transformer": torch.bfloat16, "default": torch.float64}
    with pytest.warns(
        UserWarning, match="latents of DiT and SiT are decoded as they were made, with scaling_factor 0.18"
    ):
        pipe = GSPNDiTPipeline.from_pretrained(
            place / "SiT.pt", vae=vae, scheduler=scheduler, local_files_only=True, torch_dtype=dtypes
        )
    assert pipe.scheduler is scheduler
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (0.18215, None)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float64)
    pipe = GSPNDiTPipeline.from_pretrained(place / "DiT.pt", vae=tiny_vae(), dtype=torch.bfloat16)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    pipe = GSPNDiTPipeline.from_pretrained(place / "pipeline", torch_dtype=dtypes)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float64)
    for folder in (place / "pipeline", place / "pipeline" / "transformer"):
        with pytest.raises(InputError, match="convention='dit': only a file of weights"):
            GSPNDiTPipeline.from_pretrained(folder, convention="dit")


@pytest.mark.usefixtures("hub")
def test_what_is_on_the_hub_is_called_by_its_name(place, caplog):
    with caplog.at_level(logging.INFO, "gspn_dit"):
        for name in ("some/DiT", "some/files/SiT.pt"):
            load_pipeline(name)
            load_transformer(name)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[0] for line in said] == ["some/DiT"] * 2 + ["some/files/SiT.pt"] * 3


def test_export_names_folders_that_say_nothing(place, tmp_path, monkeypatch):
    vae = str(place / "vae")
    for folder, model, name in (
        (place / "pipeline", ".", "pipeline"),
        (place / "pipeline", "transformer", "pipeline/transformer"),
        (place / "pipeline" / "transformer", ".", "pipeline/transformer"),
    ):
        monkeypatch.chdir(folder)
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        export(ExportOptions(model, str(out), vae))
        assert f"from `{name}`;" in (out / "README.md").read_text()


def test_a_library_call_is_silent(place, capfd, caplog):
    with caplog.at_level(logging.ERROR):
        load_transformer(place / "SiT.pt")
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


@pytest.mark.parametrize("name", ["DiT.pt", "SiT.pt"])
@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.7, "apg_eta": 0.5}])
def test_guidance_of_a_file_acts_on_three_channels_as_its_code_has_it(place, tmp_path, name, options):
    """DiT and SiT guide `model_out[:, :3]`; the fourth channel is the prediction with the class, whatever guides."""
    load_pipeline(place / name, str(place / "vae")).save_pretrained(tmp_path)
    pipe = GSPNDiTPipeline.from_pretrained(tmp_path)
    assert pipe.config.guided_channels == 3
    pipe.set_progress_bar_config(disable=True)
    network, labels = as_of_dits_code(diffusers_dit()), torch.tensor([0, 9])
    latents = torch.randn(2, 4, 8, 8, generator=noise())
    seen = [(None, latents, None)]

    def keep(pipe, step, timestep, found):
        seen.append((float(timestep), found["latents"], found["noise_pred"]))
        return {}

    asked = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["latents", "noise_pred"]}
    pipe(labels.tolist(), 4.0, 3, latents=latents, generator=noise(), output_type="latent", **asked, **options)
    with torch.no_grad():
        for (_, noisy, _), (timestep, _, guided) in itertools.pairwise(seen):
            sign, time = (-1, 1 - timestep / 1000) if name == "SiT.pt" else (1, timestep)
            times = torch.full((2,), time)
            cond, uncond = (
                sign * network(noisy, timestep=times, class_labels=each).sample[:, :4]
                for each in (labels, torch.full((2,), 10))
            )
            torch.testing.assert_close(guided[:, 3], cond[:, 3], atol=1e-4, rtol=0)
            published = uncond[:, :3] + 4 * (cond[:, :3] - uncond[:, :3])
            difference = (guided[:, :3] - published).abs().max()
            assert difference > 1e-2 if options else difference < 1e-3
            assert (cond - uncond).abs().max() > 1e-2


def test_a_pipeline_of_others_or_ours_is_guided_in_all_channels(place):
    assert load_pipeline(place / "pipeline").config.guided_channels is None
    assert load_pipeline(place / "pipeline" / "transformer", str(place / "vae")).config.guided_channels is None
    with pytest.raises(InputError, match="guided_channels=5: wanted 1 to 4, or None"):
        GSPNDiTPipeline.from_pretrained(place / "DiT.pt", vae=tiny_vae(), guided_channels=5)
