"""The quick score during training: in the record and the trackers, resumable, and never the end of a run."""

import shutil

import numpy as np
import pytest
from made.images import write_images
from made.runs import list_checkpoints
from made.training import SCORED, config, losses, scores
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gspn_dit.errors import InputError
from gspn_dit.evaluation import evaluate as fid_evaluate
from gspn_dit.evaluation.evaluate import evaluate
from gspn_dit.evaluation.features import observe
from gspn_dit.inference.pipeline import GSPNDiTPipeline
from gspn_dit.training import evaluator as evaluation
from gspn_dit.training.loop import train
from gspn_dit.training.record import Record

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_scores_go_to_the_record_and_the_trackers_and_survive_a_resume(tmp_path):
    run = tmp_path / "run"
    train(config(run, "digits", *SCORED, "--training.trackers", "[tensorboard]"))
    assert [row["step"] for row in scores(run)] == ["2", "4"]
    assert set(scores(run)[0]) == {"step", "fd", "classifier_score", "class_accuracy", "num_samples"}
    assert float(scores(run)[0]["fd"]) != float(scores(run)[1]["fd"])
    events = EventAccumulator(str(run / "logs" / "gspn-dit")).Reload()
    assert [event.step for event in events.Scalars("evaluation/fd")] == [2, 4]

    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    shutil.rmtree(list_checkpoints(cut)[-1])
    train(config(cut, "digits", *SCORED, "--resume", "auto"))
    assert scores(cut) == scores(run) and losses(cut) == losses(run)


def test_the_references_images_are_gone_through_once(tmp_path, monkeypatch):
    seen = []

    def spied(images, *arguments):
        seen.append(images.source)
        observe(images, *arguments)

    monkeypatch.setattr(fid_evaluate, "observe", spied)
    train(config(tmp_path / "run", "digits", *SCORED))
    assert seen == ["digits:test", "samples at step 2", "samples at step 4"]


def test_no_class_accuracy_of_a_run_of_other_classes(tmp_path):
    """Ten classes, as many as there are digits."""
    for i in range(10):
        write_images(tmp_path / "data" / f"class-{i}", count=1)
    run = tmp_path / "run"
    train(config(run, tmp_path / "data", *SCORED, "--evaluation.every", 4))
    assert set(scores(run)[0]) == {"step", "fd", "classifier_score", "num_samples"}


def test_the_grid_and_the_evaluation_draw_what_their_options_say(tmp_path, monkeypatch):
    drawn, call = [], GSPNDiTPipeline.__call__

    def spied(pipe, class_labels, **options):
        drawn.append((len(class_labels), options.get("guidance_scale", pipe.config.guidance_scale)))
        return call(pipe, class_labels, **options)

    monkeypatch.setattr(GSPNDiTPipeline, "__call__", spied)
    train(
        config(
            tmp_path / "run",
            "digits",
            *SCORED,
            "--evaluation.every",
            4,
            "--evaluation.guidance_scale",
            3,
            "--training.sample_every",
            4,
            "--sampling.num_images",
            6,
            "--sampling.guidance_scale",
            2,
        )
    )
    assert drawn == [(6, 2), (5, 3), (5, 3), (2, 3)]
    assert scores(tmp_path / "run")[0]["num_samples"] == "12.0"


@pytest.mark.slow
@pytest.mark.usefixtures("as_a_command_says_it")
def test_a_failing_evaluation_or_grid_warns_and_training_goes_on(tmp_path, monkeypatch, capsys):
    def once(*arguments, **options):
        monkeypatch.setattr(evaluation, "evaluate", evaluate)
        raise MemoryError("no room\nfor features")

    monkeypatch.setattr(evaluation, "evaluate", once)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("no folder")
    train(config(tmp_path / "run", "digits", *SCORED, "--training.sample_every", 2))
    said = [line for line in capsys.readouterr().err.splitlines() if "warning: no " in line]
    assert ["step-0000002.png (FileExistsError" in line for line in said] == [True, False, False]
    assert "evaluation at step 2 (MemoryError: no room for features); training goes on" in said[1]
    assert [row["step"] for row in scores(tmp_path / "run")] == ["4"]
    train(config(tmp_path / "plain", "digits", "--training.max_steps", 4))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")  # nor does it touch the training
    assert not (tmp_path / "plain" / "evaluation.csv").exists()  # off by default


def test_scores_of_other_columns_are_kept_aside(tmp_path):
    path = tmp_path / "evaluation.csv"
    Record(path, 0, ["step", "fd"]).append({"step": 4, "fd": 1.5})
    before = path.read_text()
    assert Record(path, 4, ["step", "fd"]).path.read_text() == before
    Record(path, 4, ["step", "fid"]).append({"step": 6, "fid": 2.5})
    assert path.read_text() == "step,fid\n6,2.5\n"
    Record(path, 4, ["step", "fd"])  # and back: nothing takes the place of what was kept
    assert (tmp_path / "evaluation-1.csv").read_text() == before
    assert (tmp_path / "evaluation-2.csv").read_text() == "step,fid\n6,2.5\n"


def test_what_cannot_be_evaluated_stops_at_start(tmp_path):
    write_images(tmp_path / "small", size=(16, 16))
    np.savez_compressed(tmp_path / "of-inception.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    for changes, named in (
        (["--evaluation.reference", tmp_path / "nowhere"], r"^evaluation\.reference="),
        (["--evaluation.weights", tmp_path / "nowhere"], r"^evaluation\.weights="),
        (["--evaluation.reference", tmp_path / "small"], r"^evaluation\.reference=.*its images are 16x16"),
        (["--evaluation.reference", tmp_path / "of-inception.npz"], r"^evaluation\.reference=.*of features=inception"),
        (["--data.source", "photos", "--data.image_size", 64], r"^evaluation\.features='digits': takes 32x32.* 64x64"),
    ):
        with pytest.raises(InputError, match=named):
            train(config(tmp_path / "run", "digits", *SCORED, *changes))
    with pytest.raises(InputError, match=r"^--evaluation\.reference: missing; wanted images"):
        config(tmp_path / "run", "digits", "--evaluation.every", 2)
    assert not (tmp_path / "run").exists()
