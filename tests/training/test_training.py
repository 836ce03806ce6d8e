"""Training as users start it, in one process: real components, tiny models."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from made.faults import finished, start, text
from made.runs import CLASS_NAMES, list_checkpoints, make_run, tiny_vae
from made.store import make_store
from made.training import TRAIN, config, losses, options, rows, wait_for
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from gspn_dit.autoencoder import encode_moments
from gspn_dit.config import Config
from gspn_dit.errors import InputError
from gspn_dit.inference.loading import load_pipeline
from gspn_dit.models import create_model
from gspn_dit.models.gspn_dit import GSPNDiTBlock
from gspn_dit.progress import figure
from gspn_dit.storage.files import sha256
from gspn_dit.storage.pictures import save_image
from gspn_dit.storage.run_folder import Checkpoint
from gspn_dit.training.checks import check_launch
from gspn_dit.training.diffusion import LABELS, start_from
from gspn_dit.training.evaluator import draw_samples
from gspn_dit.training.latents import FromImages, FromMoments
from gspn_dit.training.loop import train
from gspn_dit.training.record import draw_loss, log_ticks, running_mean
from gspn_dit.training.step import NonFiniteLoss
from gspn_dit.training.trackers import start_trackers, track_samples

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gspn-dit", "gspn"])
def test_a_killed_run_resumes_to_the_same_losses(tmp_path, store, model):
    changes = [
        "--training.max_steps",
        60,
        "--training.checkpoint_every",
        7,
        "--training.warmup_steps",
        5,
        "--training.lr_schedule",
        "cosine",
        "--resume",
        "auto",
    ]
    if model == "gspn":  # draws its own random numbers: stochastic depth
        changes += ["--model.name", "gspn-ti-1", "--model.overrides", "{width: 32, depth: 3, stochastic_depth: 0.9}"]
    train(config(tmp_path / "whole", store, *changes))
    killed, log = tmp_path / "killed", tmp_path / "log"
    for kill_after in (9, 25):
        process = start(options(killed, store, *changes), log)
        wait_for(killed, kill_after)
        process.kill()
        assert finished(process) == -signal.SIGKILL and len(rows(killed)) < 60
    assert finished(start(options(killed, store, *changes), log)) == 0, text(log)
    assert losses(killed) == losses(tmp_path / "whole")
    assert [step for step, _ in losses(killed)] == list(range(1, 61))
    assert len(list_checkpoints(killed)) == 3  # the newest, no more
    assert not list((killed / "checkpoints").glob(".*"))


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """A store that holds mirrored latents too."""
    return make_store(tmp_path_factory.mktemp("mirrored") / "store", flipped=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, mirrored):
    """The losses of a run of four steps that no option changed."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train(config(run, mirrored, "--training.max_steps", 4))
    AcceleratorState._reset_state(reset_partial_state=True)
    return losses(run)


@pytest.mark.parametrize(
    "change",
    [
        "--seed 1",
        "--diffusion.class_dropout 0.9",
        "--diffusion.time_sampling logit-normal",
        "--data.horizontal_flip true",
        "--training.weight_decay 10",
        "--training.warmup_steps 8",
        "--training.lr_schedule cosine",
        "--training.adam_beta1 0.5",
        "--training.adam_beta2 0.5",
        "--training.max_grad_norm 0.01",
        "--training.mixed_precision bf16",
    ],
)
def test_an_option_is_heeded(tmp_path, mirrored, plain, change):
    train(config(tmp_path / "run", mirrored, "--training.max_steps", 4, *change.split()))
    assert losses(tmp_path / "run") != plain


def test_a_warm_up_s_first_step_is_a_step_at_its_share_of_the_learning_rate(tmp_path, store):
    for name, rate, steps in (("warm", 1e-3, 10), ("tenth", 1e-4, 0)):
        train(
            config(
                tmp_path / name,
                store,
                "--training.learning_rate",
                rate,
                "--training.warmup_steps",
                steps,
                "--training.max_steps",
                1,
            )
        )
    warm, tenth = (load_file(list_checkpoints(tmp_path / name)[-1] / "model.safetensors") for name in ("warm", "tenth"))
    for key in warm:
        torch.testing.assert_close(warm[key], tenth[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["moments", "images"])
def test_what_is_learned_is_drawn_from_the_posterior(kind):
    vae, noise = tiny_vae(), torch.randn(2, 4, 8, 8)
    if kind == "moments":
        mean, std = torch.randn(2, 4, 8, 8), 3.0
        samples = {"moments": torch.cat([mean, torch.full_like(mean, 2 * math.log(std))], dim=1)}
        encoder = FromMoments(vae.config)
    else:
        samples = {"image": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}
        mean, logvar = encode_moments(vae, samples["image"]).chunk(2, dim=1)
        std = torch.exp(0.5 * logvar)
        encoder = FromImages(vae)
    latents = encoder({**samples, "posterior_noise": noise})
    torch.testing.assert_close(latents, (mean + std * noise) * vae.config.scaling_factor)


def test_a_line_s_loss_is_the_mean_since_the_line_before(tmp_path, store):
    for every in (1, 4):
        train(config(tmp_path / str(every), store, "--training.log_every", every))
    each, means = ([float(loss) for _, loss in losses(tmp_path / str(every))] for every in (1, 4))
    assert means == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 4], rel=1e-12)


def test_the_mean_loss_between_lines_survives_a_resume(tmp_path, store):
    every_five = ["--training.log_every", 5, "--training.checkpoint_every", 3, "--training.max_steps"]
    train(config(tmp_path / "whole", store, *every_five, 10))
    train(config(tmp_path / "cut", store, *every_five, 10))
    for path in list_checkpoints(tmp_path / "cut")[1:]:
        shutil.rmtree(path)  # back to step 6, in the middle of a line
    (tmp_path / "cut" / "metrics.csv").open("a").write("11,0.5")  # and a line that a crash cut short
    train(config(tmp_path / "cut", store, *every_five, 10, "--resume", "auto"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_accumulation_does_not_change_the_losses(tmp_path, store):
    for n in (1, 4):
        train(
            config(tmp_path / str(n), store, "--training.gradient_accumulation_steps", n, "--training.max_grad_norm", 1)
        )
    one, four = ([float(loss) for _, loss in losses(tmp_path / str(n))] for n in (1, 4))
    torch.testing.assert_close(torch.tensor(four), torch.tensor(one), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "gspn", "gspn-dit"])
def test_every_family_learns_the_data(tmp_path, store, name):
    # The made latents are constant over the map, so their velocity is soon found where noise is low.
    small = "{width: 32, depth: 3}" if name == "gspn" else "{width: 32, depth: 2, mlp_ratio: 2}"
    if name == "dit":
        small = small.replace("}", ", num_heads: 2}")
    elif name == "gspn-dit":
        small = small.replace("}", ", num_groups: 2, global_layers: 1}")
    train(
        config(
            tmp_path / name,
            store,
            "--model.name",
            f"{name}-ti-1",
            "--model.overrides",
            small,
            "--training.max_steps",
            60,
            "--training.batch_size",
            16,
            "--training.learning_rate",
            3e-3,
        )
    )
    values = [float(loss) for _, loss in losses(tmp_path / name)]
    assert sum(values[-10:]) < 0.9 * sum(values[:10])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "changes", "tolerance"),
    [
        ("flow", ["--training.mixed_precision", "bf16"], 2e-2),
        ("ddpm", ["--training.mixed_precision", "bf16"], 2e-2),
        ("ddpm", ["--training.gradient_checkpointing", "true"], 1e-5),
        pytest.param(
            "flow",
            ["--training.compile", "true"],
            1e-3,
            marks=pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler too"),
        ),
    ],
    ids=["flow-bf16", "ddpm-bf16", "ddpm-checkpointing", "flow-compile"],
)
def test_options_change_speed_and_not_the_losses(tmp_path, store, objective, changes, tolerance):
    counters.clear()
    for name, more in (("plain", []), ("changed", changes)):
        train(config(tmp_path / name, store, "--diffusion.objective", objective, *more))
        AcceleratorState._reset_state(reset_partial_state=True)
    plain, changed = ([float(loss) for _, loss in losses(tmp_path / name)] for name in ("plain", "changed"))
    assert len(set(plain)) == 8
    if "--training.mixed_precision" in changes:
        assert plain != changed
    if "--training.compile" in changes:
        assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(torch.tensor(changed), torch.tensor(plain), rtol=tolerance, atol=0)


@pytest.mark.parametrize(("checkpointing", "times"), [("false", 1), ("true", 2)])
def test_gradient_checkpointing_runs_every_block_twice_a_step(tmp_path, store, monkeypatch, checkpointing, times):
    runs, forward = [], GSPNDiTBlock.forward

    def counted(block, *inputs):
        runs.append(block)
        return forward(block, *inputs)

    monkeypatch.setattr(GSPNDiTBlock, "forward", counted)
    changes = ["--training.gradient_checkpointing", checkpointing, "--training.max_steps", 2]
    train(config(tmp_path / "run", store, *changes))
    assert list(Counter(map(id, runs)).values()) == [2 * times] * 2


def test_clipping_bounds_the_step_and_reports_the_whole_norm(tmp_path, store):
    for name, norm in (("free", 0), ("clipped", 1e-4)):
        train(config(tmp_path / name, store, "--training.max_grad_norm", norm, "--training.max_steps", 1))
    free, clipped = (float(rows(tmp_path / name)[0]["grad_norm"]) for name in ("free", "clipped"))
    assert free == clipped > 1e-4
    state = load_file(list_checkpoints(tmp_path / "clipped")[-1] / "optimizer.safetensors")
    first = torch.cat([value.flatten() for key, value in state.items() if key.endswith(".exp_avg")])
    assert first.norm().item() == pytest.approx((1 - 0.9) * 1e-4, rel=1e-2)  # 1 - β₁ of the clipped gradient


def test_accumulation_is_the_configuration_s_whatever_the_environment_says(tmp_path, store, monkeypatch):
    train(config(tmp_path / "plain", store, "--training.max_steps", 1))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(config(tmp_path / "told", store, "--training.max_steps", 1))
    plain, told = (float(rows(tmp_path / name)[0]["grad_norm"]) for name in ("plain", "told"))
    assert plain == told


@pytest.mark.parametrize("fault", ["activation_checkpointing", "cpu_offload"])
def test_what_fsdp2_would_do_to_weights_behind_our_back_is_refused(fault):
    plugin = SimpleNamespace(activation_checkpointing=False, cpu_offload=OffloadPolicy())
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        is_fsdp2=True,
        device=torch.device("cpu"),
        state=SimpleNamespace(fsdp_plugin=plugin),
    )
    check_launch(accelerator)
    setattr(plugin, fault, {"activation_checkpointing": True, "cpu_offload": CPUOffloadPolicy()}[fault])
    with pytest.raises(InputError, match=r"^fsdp_(activation_checkpointing|offload_params)=True: wanted false"):
        check_launch(accelerator)


def test_the_curve_s_mean_is_over_a_tenth_of_it():
    values = torch.rand(57, dtype=torch.float64).tolist()
    wanted = [sum(values[max(0, i - 4) : i + 1]) / len(values[max(0, i - 4) : i + 1]) for i in range(57)]
    assert running_mean(values).tolist() == pytest.approx(wanted, rel=1e-12)
    assert running_mean(values[:3]).tolist() == pytest.approx(values[:3], rel=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.13, 1.1, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]),
        (1.9612, 2.0788, [1.98, 2.0, 2.02, 2.04, 2.06]),
        (0.38, 60, [0.5, 1, 2, 5, 10, 20, 50]),
        (0.1, 1, [0.1, 0.2, 0.5, 1]),
        (0.4895, 0.511, [0.49, 0.495, 0.5, 0.505, 0.51]),
        (50, 3e16, [1e2, 1e4, 1e6, 1e8, 1e10, 1e12, 1e14, 1e16]),
    ],
)
def test_the_curve_s_ticks_are_round_numbers(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks, rel=1e-9)


def test_a_curve_of_one_point_is_a_mark(tmp_path):
    draw_loss([{"step": 1, "loss": 0.98}], "run", tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).astype(int)
    blue = (abs(pixels - (31, 119, 180)).sum(axis=2) < 30) & (np.arange(pixels.shape[0]) > 150)[:, None]  # no legend
    down, right = blue.nonzero()
    assert len(down) > 20 and np.ptp(down) < 15 and np.ptp(right) < 15


def test_wandb_gets_the_run_s_name_its_options_and_its_grids(tmp_path, monkeypatch):
    told = []
    run = SimpleNamespace(log=lambda values, **more: told.append((values, more)))
    wandb = SimpleNamespace(
        init=lambda **given: told.append(given) or run,
        Image=lambda pixels: pixels.shape,
        config=SimpleNamespace(update=lambda values, **_: told.append(values)),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    accelerator = Accelerator(cpu=True)
    accelerator.log_with = ["wandb"]
    start_trackers(accelerator, Config(output_dir=str(tmp_path / "mine")))
    save_image(torch.zeros(3, 8, 16, dtype=torch.uint8), tmp_path / "grid.png")
    track_samples(accelerator, tmp_path / "grid.png", 7)
    begun, options, grid = told
    assert begun == {"project": "gspn-dit", "name": "mine"}
    assert options["model.name"] == Config().model.name and options["sampling.guidance_interval"] == "[0.0, 1.0]"
    assert all(isinstance(value, int | float | str) for value in options.values())
    assert grid == ({"samples": [(8, 16, 3)]}, {"step": 7})


def test_a_run_resumes_with_another_accumulation(tmp_path, store):
    train(config(tmp_path / "whole", store))
    train(config(tmp_path / "split", store, "--training.max_steps", 3, "--training.checkpoint_every", 3))
    train(config(tmp_path / "split", store, "--resume", "auto", "--training.gradient_accumulation_steps", 2))
    whole, split = ([float(loss) for _, loss in losses(tmp_path / name)] for name in ("whole", "split"))
    torch.testing.assert_close(torch.tensor(split), torch.tensor(whole), rtol=1e-4, atol=0)


@pytest.mark.usefixtures("loss_curves")
def test_a_run_leaves_what_it_should(tmp_path, capsys):
    run = tmp_path / "run"
    train(
        config(
            run,
            "digits",
            "--training.sample_every",
            4,
            "--training.trackers",
            "[tensorboard]",
            "--training.max_steps",
            6,
            "--training.keep_checkpoints",
            1,
        )
    )
    assert [path.name for path in list_checkpoints(run)] == ["step-0000006"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-0000004.png", "step-0000006.png"]
    assert Image.open(run / "loss.png").size[0] > 500 and not (run / ".lock").exists()
    events = EventAccumulator(str(run / "logs" / "gspn-dit")).Reload()
    assert [image.step for image in events.Images("samples")] == [4, 6]
    assert events.Images("samples")[1].encoded_image_string == (run / "samples" / "step-0000006.png").read_bytes()
    (options,) = (run / "logs").rglob("hparams.yml")
    assert yaml.safe_load(options.read_text())["training.learning_rate"] == 1e-3
    tracked = [(event.step, event.value) for event in events.Scalars("loss")]
    assert tracked == [(step, pytest.approx(float(loss), rel=1e-6)) for step, loss in losses(run)]
    assert Config.load(run / "config.yaml") == Config.load(run / "checkpoints" / "step-0000006" / "config.yaml")
    assert json.loads((run / "class_names.json").read_text()) == [str(digit) for digit in range(10)]
    assert {"step", "loss", "learning_rate", "grad_norm", "images_per_second"} == set(rows(run)[0])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run: ")]
    wanted = [
        rf"run: {step}( of 6)? steps in 00:0\d, loss {figure(float(loss))}, lr 0\.001, grad .* images/s"
        for step, loss in losses(run)
    ]
    assert len(said) == 6 and all(map(re.match, wanted, said)), said
    (image,) = load_pipeline(run)("3", num_inference_steps=2).images
    assert image.size == (32, 32)


def test_a_run_of_before_windows_were_the_default_resumes_as_it_began(tmp_path, store):
    """Its checkpoints' configurations do not say what a model is that has no windows."""
    new, whole, run = (tmp_path / name for name in ("new", "whole", "run"))
    in_chunks = ["--model.overrides.windows", "null"]
    train(config(new, store))
    train(config(whole, store, *in_chunks))
    train(config(run, store, *in_chunks, "--training.max_steps", 4))
    (path,) = list_checkpoints(run)
    checkpoint = Checkpoint(path)
    model, options = json.loads(checkpoint.ema_config.read_text()), yaml.safe_load(checkpoint.config.read_text())
    assert model.pop("windows") is None and options["model"]["overrides"].pop("windows") is None
    checkpoint.ema_config.write_text(json.dumps(model))
    checkpoint.config.write_text(yaml.safe_dump(options))
    metadata = checkpoint.read_metadata()
    for file in checkpoint.ema_config, checkpoint.config:
        written = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        metadata["files"][file.relative_to(path).as_posix()] = written
    checkpoint.metadata.write_text(json.dumps(metadata))
    train(config(run, store, "--resume", "auto"))
    assert losses(run) == losses(whole) != losses(new)
    assert json.loads(Checkpoint(list_checkpoints(run)[-1]).ema_config.read_text())["windows"] is None
    assert json.loads(Checkpoint(list_checkpoints(new)[-1]).ema_config.read_text())["windows"] == "shifted"


@pytest.mark.usefixtures("as_a_command_says_it")
def test_what_has_changed_at_a_resume_is_said(tmp_path, store, capsys):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    train(config(run, store, "--training.max_steps", 4))
    assert "changed since" not in capsys.readouterr().out
    shutil.copytree(store, elsewhere)  # the same images in another place
    train(config(run, elsewhere, "--resume", "auto", "--training.ema_decay", 0.5))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed since step-0000004: ")]
    assert "training.ema_decay 0.9999 → 0.5" in said and str(elsewhere) in said and "training.max_steps 4 → 8" in said
    assert "resume" not in said and "seed" not in said


def test_a_new_run_begins_with_the_averaged_weights_of_another(tmp_path, store):
    train(config(tmp_path / "first", store))
    begin = ["--model.init_from", tmp_path / "first", "--training.max_steps", 1]
    train(config(tmp_path / "second", store, *begin, "--training.learning_rate", 1e-12))
    (last,) = list_checkpoints(tmp_path / "first")[-1:]
    (only,) = list_checkpoints(tmp_path / "second")
    ours, theirs = load_file(only / "model.safetensors"), load_file(Checkpoint(last).ema_weights)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-9)
    with pytest.raises(InputError, match=r"^model\.init_from=.*blocks\.0.*same model\.name"):
        train(config(tmp_path / "third", store, *begin, "--model.overrides.mlp_ratio", 4))
    with pytest.raises(InputError, match=r"^model\.init_from=.*its blocks\.1.*this model's not there"):
        train(config(tmp_path / "third", store, *begin, "--model.overrides.depth", 1))
    with pytest.raises(InputError, match=r"^model\.init_from='nowhere': no such folder"):
        train(config(tmp_path / "third" / "run", store, "--model.init_from", "nowhere"))
    assert not (tmp_path / "third").exists()
    train(config(tmp_path / "second", store, "--model.init_from", "nowhere", "--resume", "auto"))  # has its own weights


def test_weights_of_a_dit_go_on_at_another_size(tmp_path):
    run = make_run(tmp_path / "run", "dit-ti-2")
    larger = create_model("dit-ti-2", sample_size=16, num_classes=3, out_channels=4)
    positions = larger.pos_embed.clone()
    assert start_from(larger, str(run), CLASS_NAMES) is None
    weights = dict(load_pipeline(run).transformer.named_parameters())
    assert torch.equal(larger.pos_embed, positions)
    assert all(torch.equal(p, weights[name]) for name, p in larger.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["dit-ti-2", "gspn-ti-2", "gspn-dit-ti-2"])
def test_weights_go_on_with_other_classes(tmp_path, name):
    run = make_run(tmp_path / "run", name)
    names = ["axolotl", "goldfish", "golden retriever", "newt", "toad"]
    model = create_model(name, sample_size=8, num_classes=5, out_channels=4)
    fresh = model.y_embedder.embedding_table.weight.clone()
    said = start_from(model, str(run), names)
    assert said == f"{run} has 3 classes, the data 5: new label rows for 3; 2 of the same name keep theirs"
    theirs = dict(load_pipeline(run).transformer.named_parameters())
    table, old = model.y_embedder.embedding_table.weight, theirs["y_embedder.embedding_table.weight"]
    for row, wanted in enumerate((fresh[0], old[CLASS_NAMES.index("goldfish")], old[0], fresh[3], fresh[4], old[3])):
        assert torch.equal(table[row], wanted), row
    assert not torch.equal(fresh[5], old[3])
    others = [key for key, p in model.named_parameters() if p.requires_grad and "y_embedder" not in key]
    assert all(torch.equal(model.get_parameter(key), theirs[key]) for key in others)


@pytest.mark.usefixtures("as_a_command_says_it")
def test_a_run_on_other_classes_says_so_and_learns(tmp_path, store, capsys):
    first = tmp_path / "first"
    train(config(first, store, "--training.max_steps", 2))
    other = make_store(tmp_path / "store", classes=4)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config(tmp_path / "second", other, "--training.max_steps", 2, "--model.init_from", first))
    assert f"{first} has 3 classes, the data 4: new label rows for 1; 3 of the same name" in capsys.readouterr().out
    assert load_pipeline(tmp_path / "second").transformer.config.num_classes == 4


def test_one_class_is_training_without_a_condition(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "pictures" / "all").mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "pictures" / "all" / f"{i}.png")
    run = tmp_path / "run"
    train(
        config(
            run,
            tmp_path / "pictures",
            "--diffusion.class_dropout",
            0,
            "--sampling.guidance_scale",
            1,
            "--training.sample_every",
            4,
            "--training.max_steps",
            4,
        )
    )
    assert (run / "samples" / "step-0000004.png").is_file()
    moments = load_file(list_checkpoints(run)[-1] / "optimizer.safetensors")[f"{LABELS}.exp_avg"]
    assert moments[0].any() and not moments[1].any(), "the one label is trained, no class is not"
    pipe = load_pipeline(run)
    assert pipe(0).images[0].size == pipe("all").images[0].size == (32, 32)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_ways_to_split_a_training_that_its_checkpoints_do_not_know_are_refused(tmp_path, store, monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType[kind]))
    with pytest.raises(InputError, match=r"^(fsdp_version=1|distributed_type='DEEPSPEED')"):
        train(config(tmp_path / "run", store))
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_the_average_takes_in_the_weights_of_every_step(tmp_path, store):
    run, decay = tmp_path / "run", 0.25
    train(config(run, store, "--training.ema_decay", decay, "--training.checkpoint_every", 1))
    before, after = list_checkpoints(run)[-2:]
    old, new = (load_file(Checkpoint(checkpoint).ema_weights) for checkpoint in (before, after))
    weights = load_file(after / "model.safetensors")
    assert old.keys() == new.keys() == weights.keys()
    for key in weights:
        torch.testing.assert_close(new[key], decay * old[key] + (1 - decay) * weights[key], rtol=0, atol=1e-6)


def test_a_training_grid_is_what_the_checkpoint_draws(tmp_path):
    run, again = tmp_path / "run", tmp_path / "again.png"
    options = config(run, "digits", "--training.sample_every", 8, "--training.learning_rate", 1e-2)
    train(options)
    draw_samples(load_pipeline(run), options, Accelerator(), again)
    assert again.read_bytes() == (run / "samples" / "step-0000008.png").read_bytes()


@pytest.mark.usefixtures("loss_curves")
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, store):
    run = tmp_path / "run"
    train(config(run, store, "--training.max_steps", 4))
    good = {path: path.read_bytes() for path in list_checkpoints(run)[-1].rglob("*") if path.is_file()}
    curve = (run / "loss.png").read_bytes()
    with pytest.raises(NonFiniteLoss, match=r"at step \d+.*step-0000004"):
        train(
            config(
                run,
                store,
                "--resume",
                "auto",
                "--training.max_steps",
                300,
                "--training.learning_rate",
                1e30,
                "--training.checkpoint_every",
                200,
            )
        )
    assert (run / "loss.png").read_bytes() != curve and len(rows(run)) > 4
    assert all(path.read_bytes() == content for path, content in good.items())
    assert [path.name for path in list_checkpoints(run)] == ["step-0000004"]


def test_a_run_is_not_overwritten_or_continued_as_another(tmp_path, store):
    run = tmp_path / "run"
    train(config(run, store, "--training.max_steps", 4))
    with pytest.raises(InputError, match=r"output_dir=.*--resume auto"):
        train(config(run, store))
    with pytest.raises(InputError, match=r"^seed=1"):
        train(config(run, store, "--resume", "auto", "--seed", 1))
    manifest = json.loads((store / "manifest.json").read_text())
    fewer = make_store(tmp_path / "fewer", images=12)
    moved = tmp_path / "moved"
    train(config(moved, fewer, "--training.max_steps", 4))
    (fewer / "manifest.json").write_text(json.dumps(manifest))
    (fewer / "shard-00000.safetensors").write_bytes((store / "shard-00000.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"^data\.source=.*24 images.*12 of 3; restore"):
        train(config(moved, fewer, "--resume", "auto"))
    renamed = json.dumps(manifest).replace("class 1", "cat")
    (fewer / "manifest.json").write_text(renamed)
    with pytest.raises(InputError, match=r"of 3 \(class 1 was 'class 1', is 'cat'\); restore"):
        train(config(moved, fewer, "--resume", "auto"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--training.max_stepz", "3"], "max_stepz"),
        (["--training.max_steps", "many"], "--training.max-steps='many'"),
        (["--training.batch_size", "0"], "--training.batch-size=0"),
        (["--model.name", "dit-xxl-2"], "dit-xxl-2"),
        (["--model.overrides.depht", "2"], "depht"),
        (["--data.source", "no/such/folder"], "gspn-dit encode --data … --vae … --image-size … --out no"),
        (["--sampling.sampler", "ddim"], "sampling.sampler='ddim'"),
        (
            ["--diffusion.objective=ddpm", "--diffusion.time_sampling=logit-normal", "--sampling.sampler=ddim"],
            "diffusion.time_sampling='logit-normal'",
        ),
        (["--data.source", "digits", "--model.overrides.patch_size", "3"], "data.image_size=32: of its latents"),
        (["--training.mixed_precision", "fp16"], "training.mixed_precision='fp16'"),
        (["--training.gradient_accumulation_steps", "3"], "training.batch_size=4"),
        (["--model.overrides.num_classes", "5"], "model.overrides.num_classes"),
        (["--training.trackers", "[wandbee]"], "wandbee"),
        (["--output_dir", ""], "--output-dir='': wanted a value"),
        (["--data.source", ""], "data.source='': wanted a value"),
        (["--data.vae="], "data.vae='': wanted a value"),
        (["--model.init_from", ""], "--model.init-from='': wanted a value"),
        (["--diffusion.objective", "ddpm", "--sampling.num_inference_steps", "1"], "num_inference_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_configuration_stops_at_start_with_its_name(tmp_path, store, changes, named):
    with pytest.raises(InputError) as error:
        train(config(tmp_path / "run", store, *changes))
    assert named in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_command_says_so_in_one_line_and_status_2(tmp_path, store):
    result = subprocess.run(
        [sys.executable, TRAIN, *options(tmp_path / "run", store, "--training.max_stepz", 3)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1 and "max_stepz" in result.stderr


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_every_recipe_is_there():
    names = {path.stem for path in CONFIGS}
    assert names >= {"digits", "photos", "imagenet256-dit-xl-2", "imagenet256-gspn-xl-2", "imagenet256-gspn-dit-xl-2"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_run_on_made_latents(tmp_path, path):
    recipe = Config.load(path)
    store = make_store(
        tmp_path / "store",
        images=4,
        classes=2,
        size=(8, 8),
        image_size=recipe.data.image_size,
        flipped=recipe.data.horizontal_flip,
        vae=recipe.data.vae,
    )
    # the recipe's own family and options, with layers as few and narrow as its kinds of layers allow
    changes = [
        "--output_dir",
        tmp_path / "run",
        "--data.source",
        store,
        "--data.num_workers",
        0,
        "--training.max_steps",
        1,
        "--training.batch_size",
        2,
        "--training.sample_every",
        0,
        "--training.trackers",
        "[]",
        "--model.overrides.depth",
        3,
        "--model.overrides.width",
        128,
    ]
    heads = {"dit": "num_heads", "gspn-dit": "num_groups"}.get(recipe.model.name.rsplit("-", 2)[0])
    if heads:
        changes += [f"--model.overrides.{heads}", 2]
    train(Config.load(path, [str(value) for value in changes]))
    assert len(losses(tmp_path / "run")) == 1


def test_imagenet_recipes_are_the_papers():
    for name in ("dit-xl-2", "gspn-xl-2", "gspn-dit-xl-2"):
        recipe = Config.load(ROOT / "configs" / f"imagenet256-{name}.yaml")
        training = recipe.training
        assert recipe.model.name == name and not recipe.model.overrides
        assert (training.batch_size, training.learning_rate, training.weight_decay) == (256, 1e-4, 0)
        assert (training.ema_decay, training.max_steps) == (0.9999, 400_000)
        assert (recipe.diffusion.class_dropout, recipe.data.horizontal_flip, recipe.data.image_size) == (0.1, True, 256)
