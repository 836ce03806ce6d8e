"""Training in several real processes: the same losses as in one, and nothing lost when one of them dies."""

import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from made.launched import SOUND, finish, kill_one_process, launch, launchers, train_many
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


@pytest.mark.slow
@launchers
def test_two_processes_learn_as_one_and_their_checkpoints_are_the_same(tmp_path, store, one, launcher):
    begun = tmp_path / "begun"
    shutil.copytree(one, begun)
    shutil.rmtree(list_checkpoints(begun)[-1])  # back to step 4 of one process
    accumulating = [*AVERAGES, "--training.gradient_accumulation_steps", 2]
    train_many(
        tmp_path,
        [
            options(tmp_path / "two", store, *accumulating, "--training.sample_every", 8),
            options(begun, store, *accumulating, "--resume", "auto"),
            options(tmp_path / "everything", store, *accumulating, *EVERYTHING),
            options(tmp_path / "scored", "digits", *SCORED),
        ],
        launcher,
    )
    for run, tolerance in (("two", 1e-4), ("begun", 1e-4), ("everything", 2e-2)):
        torch.testing.assert_close(values(tmp_path / run), values(one), rtol=tolerance, atol=0)
    ours, theirs = ([float(row["grad_norm"]) for row in rows(run)] for run in (tmp_path / "two", one))
    assert ours == pytest.approx(theirs, rel=1e-3)
    for name in ("model", "optimizer", "ema/diffusion_pytorch_model", "power-ema-0.05", "power-ema-0.1"):
        ours, theirs = (load_file(list_checkpoints(run)[-1] / f"{name}.safetensors") for run in (tmp_path / "two", one))
        assert ours.keys() == theirs.keys() and len(ours) > 20
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=2e-5)
    assert (tmp_path / "two" / "samples" / "step-0000008.png").is_file()
    assert load_pipeline(tmp_path / "two")(1, num_inference_steps=2).images

    train(config(tmp_path / "scored-by-one", "digits", *SCORED))
    ours, theirs = (float(scores(tmp_path / run)[-1]["fd"]) for run in ("scored", "scored-by-one"))
    assert ours == pytest.approx(theirs, rel=1e-2)

    shutil.rmtree(list_checkpoints(tmp_path / "two")[-1])  # and from two processes back to one
    train(config(tmp_path / "two", store, *AVERAGES, "--resume", "auto"))
    torch.testing.assert_close(values(tmp_path / "two"), values(one), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_stopped_and_a_killed_run_go_on_in_any_number_of_processes(tmp_path, store):
    changes = ["--training.max_steps", 200, "--training.checkpoint_every", 20, "--resume", "auto"]
    train(config(tmp_path / "whole", store, *changes))
    run = tmp_path / "run"

    process = launch(2, TRAIN, *options(run, store, *changes))
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

    process = launch(2, TRAIN, *options(run, store, *changes))
    kill_one_process(process, 1, lambda: len(rows(run)) >= step + 30)  # the launcher notices and ends
    last = checkpoint_step(list_checkpoints(run)[-1])
    assert step < last and len(rows(run)) - last <= 20 + 1, "no more than the steps since the last checkpoint"

    train(config(run, store, *changes))
    assert [each for each, _ in losses(run)] == list(range(1, 201))
    torch.testing.assert_close(values(run), values(tmp_path / "whole"), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_an_error_under_the_launcher_is_one_line(tmp_path, store):
    printed = finish(launch(2, TRAIN, *options(tmp_path / "run", tmp_path / "nowhere")), status=1)
    (said,) = [line for line in printed.splitlines() if "error: " in line and "train_dit.py" in line]
    assert "data.source=" in said and not (tmp_path / "run").exists()
