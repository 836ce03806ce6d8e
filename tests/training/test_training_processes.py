"""Training in several real processes: the same losses as in one, and nothing lost when one of them dies."""

import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from made import classifying
from made.launched import LAUNCHERS, SOUND, WarmLaunch, finish, kill_one_process, launch, train_many
from made.runs import checkpoint_step, list_checkpoints
from made.training import SCORED, TRAIN, config, losses, options, rows, scores, wait_for
from safetensors.torch import load_file

from gspn_dit.inference.loading import load_pipeline
from gspn_dit.training.loop import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
EVERYTHING = [
    "--training.mixed_precision",
    "bf16",
    "--training.gradient_checkpointing",
    "true",
    "--training.compile",
    "true" if SOUND and shutil.which("c++") else "false",
]
AVERAGES = ["--training.posthoc_ema_every", 4]


@pytest.fixture(scope="module")
def one(tmp_path_factory, store):
    """The run that all others are held against: one process, the whole batch at once."""
    run = tmp_path_factory.mktemp("one") / "run"
    train(config(run, store, *AVERAGES))
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


def values(run):
    return torch.tensor([float(loss) for _, loss in losses(run)])


ACCUMULATING = ["--training.gradient_accumulation_steps", 2]
CLASSIFIERS = {"shifted": [], "mixed": [*classifying.EVERYTHING, "--training.layer_decay", 0.8]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return classifying.write_idx_folder(tmp_path_factory.mktemp("idx") / "data")


@pytest.fixture(scope="module", params=LAUNCHERS)
def two(request, tmp_path_factory, store, pictures, one):
    """A folder of runs of two processes, of both kinds of training: to start processes takes longer than the runs."""
    folder = tmp_path_factory.mktemp("two")
    begun = folder / "begun"
    shutil.copytree(one, begun)
    shutil.rmtree(list_checkpoints(begun)[-1])  # back to step 4 of one process
    accumulating = [*AVERAGES, *ACCUMULATING]
    runs = [
        ("Config", options(folder / "two", store, *accumulating, "--training.sample_every", 8)),
        ("Config", options(begun, store, *accumulating, "--resume", "auto")),
        ("Config", options(folder / "everything", store, *accumulating, *EVERYTHING)),
        ("Config", options(folder / "scored", "digits", *SCORED)),
    ]
    for name, changes in CLASSIFIERS.items():
        given = classifying.options(folder / name, pictures, *changes, *ACCUMULATING)
        runs.append(("ClassifierConfig", given))
    train_many(folder, runs, request.param)
    return folder


@pytest.mark.slow
def test_two_processes_learn_as_one_and_their_checkpoints_are_the_same(tmp_path, store, one, two):
    for run, tolerance in (("two", 1e-4), ("begun", 1e-4), ("everything", 2e-2)):
        torch.testing.assert_close(values(two / run), values(one), rtol=tolerance, atol=0)
    ours, theirs = ([float(row["grad_norm"]) for row in rows(run)] for run in (two / "two", one))
    assert ours == pytest.approx(theirs, rel=1e-3)
    for name in ("model", "optimizer", "ema/diffusion_pytorch_model", "power-ema-0.05", "power-ema-0.1"):
        ours, theirs = (load_file(list_checkpoints(run)[-1] / f"{name}.safetensors") for run in (two / "two", one))
        assert ours.keys() == theirs.keys() and len(ours) > 20
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=2e-5)
    assert (two / "two" / "samples" / "step-0000008.png").is_file()
    assert load_pipeline(two / "two")(1, num_inference_steps=2).images

    train(config(tmp_path / "scored-by-one", "digits", *SCORED))
    ours, theirs = (float(scores(run)[-1]["fd"]) for run in (two / "scored", tmp_path / "scored-by-one"))
    assert ours == pytest.approx(theirs, rel=1e-2)

    shutil.rmtree(list_checkpoints(two / "two")[-1])  # and from two processes back to one
    train(config(two / "two", store, *AVERAGES, "--resume", "auto"))
    torch.testing.assert_close(values(two / "two"), values(one), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_two_processes_teach_a_classifier_as_one(tmp_path, pictures, two):
    """The same pictures, mixed alike; and the same accuracies."""
    for name, changes in CLASSIFIERS.items():
        train(classifying.config(tmp_path / name, pictures, *changes))
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.testing.assert_close(values(two / name), values(tmp_path / name), rtol=1e-4, atol=0)
        found, wanted = (classifying.accuracies(folder / name) for folder in (two, tmp_path))
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours["num_images"] == theirs["num_images"] == "10.0"
            assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-3)


@pytest.mark.slow
def test_a_stopped_and_a_killed_run_go_on_in_any_number_of_processes(tmp_path, store):
    changes = ["--training.max_steps", 80, "--training.checkpoint_every", 10, "--resume", "auto"]
    train(config(tmp_path / "whole", store, *changes))
    run = tmp_path / "run"

    process = WarmLaunch(2, TRAIN, *options(run, store, *changes))
    wait_for(run, 3, process)
    process.send_signal(signal.SIGTERM)  # to the launcher, as a scheduler does
    printed, _ = process.communicate(timeout=60)
    assert "2 × cpu" in printed
    (said,) = [line for line in printed.splitlines() if line.startswith("SIGTERM")]
    (checkpoint,) = list_checkpoints(run)[-1:]
    step = checkpoint_step(checkpoint)
    assert f"after step {step}" in said and str(checkpoint) in said
    assert [each for each, _ in losses(run)] == list(range(1, step + 1)), "all processes ended with the same step"
    assert "ChildFailedError" not in printed  # they left by themselves

    process = WarmLaunch(2, TRAIN, *options(run, store, *changes))
    kill_one_process(process, 1, lambda: len(rows(run)) >= step + 15)  # the launcher notices and ends
    last = checkpoint_step(list_checkpoints(run)[-1])
    assert step < last and len(rows(run)) - last <= 10 + 1, "no more than the steps since the last checkpoint"

    train(config(run, store, *changes))
    assert [each for each, _ in losses(run)] == list(range(1, 81))
    torch.testing.assert_close(values(run), values(tmp_path / "whole"), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_an_error_under_the_launcher_is_one_line(tmp_path, store):
    printed = finish(launch(2, TRAIN, *options(tmp_path / "run", tmp_path / "nowhere")), status=1)
    (said,) = [line for line in printed.splitlines() if "error: " in line and "train_dit.py" in line]
    assert "data.source=" in said and not (tmp_path / "run").exists()
