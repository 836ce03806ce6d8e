"""docs/reliability.md, row by row: what happens to a run, what its owner sees, and what is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from made.faults import asleep_in, finished, killed_at, limited_to, start, text, worker_killed
from made.runs import checkpoint_step, list_checkpoints
from made.store import make_store
from made.training import ROOT, config, losses, options, rows, wait_for, wait_until
from safetensors.torch import load_file, save_file

from gspn_dit.config import Config
from gspn_dit.errors import InputError
from gspn_dit.options import parse
from gspn_dit.training.checkpoints import _sums
from gspn_dit.training.loop import train
from gspn_dit.training.record import Record
from gspn_dit.training.step import NonFiniteLoss

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
RESUME = ["--training.max_steps", 12, "--resume", "auto"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, store):
    """The run to which nothing happened: 12 steps, checkpoints at 4, 8 and 12."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config(run, store, *RESUME))
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


@pytest.fixture
def run(tmp_path, whole):
    """That run, after step 8."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(list_checkpoints(run)[-1])
    return run


def bytes_of(checkpoint):
    return {path.name: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 3, "removal"])
def test_sigkill_during_a_checkpoint_write(tmp_path, run, store, whole, call):
    before = {path: bytes_of(path) for path in list_checkpoints(run)}
    keep = ["--training.keep_checkpoints", 2]
    assert finished(start(options(run, store, *RESUME, *keep), tmp_path / "log", killed_at, call)) == -signal.SIGKILL
    left = list(run.glob("checkpoints/.step-*"))
    assert len(left) == 1, "it was killed in the middle"
    newest = list_checkpoints(run)[-1]
    if call != "removal":
        assert {path: bytes_of(path) for path in list_checkpoints(run)} == before
    train(config(run, store, *RESUME, *keep, "--training.max_steps", 16))
    assert losses(run)[:12] == losses(whole), f"continued from {newest}"
    assert [path.name for path in list_checkpoints(run)] == ["step-0000012", "step-0000016"]
    assert not list(run.glob("checkpoints/.*"))


def test_disk_full_during_a_checkpoint(tmp_path, run, store, whole):
    before = {path: bytes_of(path) for path in list_checkpoints(run)}
    log = tmp_path / "log"
    assert finished(start(options(run, store, *RESUME), log, limited_to, 100_000)) == 1
    (said,) = [line for line in text(log).splitlines() if line.startswith("train_dit.py: stopped")]
    assert re.search(r"step 12 could not be written \(.*File too large.*step-0000008.*Make room", said), said
    assert "Traceback" not in text(log)
    assert {path: bytes_of(path) for path in list_checkpoints(run)} == before
    assert not list(run.glob("checkpoints/.*")), "the space is given back"
    train(config(run, store, *RESUME))
    assert losses(run) == losses(whole)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", "truncated"),
        ("optimizer.safetensors", "flipped"),
        ("metadata.json", "truncated"),
        ("ema/diffusion_pytorch_model.safetensors", "missing"),
    ],
)
@pytest.mark.usefixtures("as_a_command_says_it")
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, store, whole, capsys, name, how):
    newest = list_checkpoints(run)[-1]
    content = bytearray((newest / name).read_bytes())
    content[-100] ^= 1
    if how == "missing":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(content if how == "flipped" else content[: len(content) // 2])
    train(config(run, store, *RESUME))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if " is damaged (" in line]
    assert str(newest) in said and "continuing from step-0000004" in said
    assert name in said or name == "metadata.json"
    assert (newest.parent / "damaged-step-0000008").is_dir()
    assert losses(run) == losses(whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_left_alone(run, store):
    for checkpoint in list_checkpoints(run):
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"output_dir=.*no checkpoint of its 2 is whole .*model\.safetensors"):
        train(config(run, store, *RESUME))
    assert len(list_checkpoints(run)) == 2


def test_a_run_whose_checkpoints_were_taken_away_is_left_alone(run, store):
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.csv").read_text()
    for resume in ("auto", "no"):
        with pytest.raises(InputError, match=r"^output_dir=.*up to step 12 and no checkpoint"):
            train(config(run, store, *RESUME, "--resume", resume))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert (run / "metrics.csv").read_text() == before


def test_a_run_cut_before_its_first_checkpoint_begins_again(run, store, whole):
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.csv").write_text("".join((run / "metrics.csv").read_text().splitlines(True)[:4]))
    train(config(run, store, *RESUME))
    assert losses(run) == losses(whole)


@pytest.mark.usefixtures("as_a_command_says_it")
def test_a_figure_that_cannot_be_noted_warns_and_training_goes_on(tmp_path, store, whole, capsys, monkeypatch):
    def full(*_):
        raise OSError(122, "Disk quota exceeded")

    append = Record.append
    monkeypatch.setattr(Record, "append", lambda self, row: append(self, row) if row["step"] < 4 else full())
    monkeypatch.setattr("gspn_dit.training.record.draw_loss", full)
    train(config(tmp_path / "run", store, *RESUME))
    said = [line for line in capsys.readouterr().err.splitlines() if "Disk quota exceeded" in line]
    # loss.png's step is the same three times, and said once
    assert len(said) == 9 + 1 and all(line.endswith("; training goes on") for line in said)
    for path in list_checkpoints(tmp_path / "run")[-1].glob("*.safetensors"):
        assert path.read_bytes() == (list_checkpoints(whole)[-1] / path.name).read_bytes()


def test_a_line_that_does_not_fit_leaves_the_table_as_it_was(tmp_path):
    """A process whose files may hold three bytes more than two lines: the third ends in its middle."""
    script = """if True:
        import resource, signal
        from pathlib import Path
        from gspn_dit.training.record import Record
        record = Record(Path("metrics.csv"), 0, ["step", "loss"])
        record.append({"step": 1, "loss": 0.5})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 + 3, 16 + 3))
        try:
            record.append({"step": 2, "loss": 0.25})
        except OSError as error:
            print(error.strerror)
    """
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert said.stdout.strip() in ("File too large", "No space left on device")
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,0.5\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="tells which files are open on Linux alone")
def test_a_resumed_run_lets_go_of_its_checkpoint(run, store, monkeypatch):
    """On NFS a file that is still mapped keeps its folder from being removed."""
    maps = []
    monkeypatch.setattr(
        "gspn_dit.training.loop.learning_rate_at",
        lambda step, options: maps.append(Path("/proc/self/maps").read_text()) or 1e-3,
    )
    train(config(run, store, *RESUME))
    assert len(maps) == 4 and not any(str(run) in each for each in maps)


def test_a_nan_batch(tmp_path):
    poisoned = make_store(tmp_path / "store", not_a_number=7)
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan, as are latents of its batch.*step \d.*--verify"):
        train(config(tmp_path / "run", poisoned, *RESUME, "--training.checkpoint_every", 1))
    taken = [step for step, _ in losses(tmp_path / "run")]
    assert checkpoint_step(list_checkpoints(tmp_path / "run")[-1]) == taken[-1] < 6  # it is seen in the first epoch
    weights = load_file(list_checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_config_from_a_newer_version(tmp_path, run, store, capsys):
    newer = tmp_path / "newer.yaml"
    newer.write_text((ROOT / "configs" / "digits.yaml").read_text() + "evaluation: {sharpness: 3}\n")
    with pytest.raises(SystemExit, match="2"):
        parse(Config, ["--config", str(newer)], prog="train_dit.py")
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "newer.yaml" in said and "evaluation.sharpness" in said
    # and a run that was begun by a newer version
    saved = list_checkpoints(run)[-1] / "config.yaml"
    text = saved.read_text()
    saved.write_text(text + "sharpness: 3\n")
    rewrite_sums(list_checkpoints(run)[-1])
    with pytest.raises(InputError, match=r"step-0000008/config\.yaml: sharpness: no such option"):
        train(config(run, store, *RESUME))
    assert len(list_checkpoints(run)) == 2


def test_two_runs_in_one_folder(tmp_path, store):
    run, endless = tmp_path / "run", ["--training.max_steps", 100_000, "--training.log_every", 5]
    first = start(options(run, store, *endless), tmp_path / "log")
    wait_for(run)
    with pytest.raises(InputError, match=rf"^output_dir=.*run': process {first.pid} on .* is training in it"):
        train(config(run, store, *endless, "--resume", "auto"))
    first.kill()
    first.join()
    before = len(rows(run))
    (run / "metrics.csv").unlink()  # so that lines below are of the second
    again = start(options(run, store, *endless, "--resume", "auto"), tmp_path / "log")  # a lock dies with its process
    wait_for(run, 2)
    os.kill(again.pid, signal.SIGTERM)
    assert finished(again) == 0, text(tmp_path / "log")
    assert before > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers", "says", "status"),
    [
        (signal.SIGTERM, 0, "SIGTERM", 0),
        (signal.SIGTERM, 1, "SIGTERM", 0),
        (signal.SIGINT, 2, "Ctrl-C", 130),
    ],
    ids=lambda value: str(value),
)
def test_sigterm_or_ctrl_c_saves_a_checkpoint_and_ends_the_run_well(tmp_path, store, number, workers, says, status):
    run, log = tmp_path / "run", tmp_path / "log"
    changes = ["--training.checkpoint_every", 100_000]
    endless = ["--training.max_steps", 100_000, "--data.num_workers", workers]
    process = start(options(run, store, *changes, *endless), log)
    wait_for(run, 3)
    os.killpg(process.pid, number)  # to its data workers too, as a scheduler may and a terminal does
    sent = time.monotonic()
    assert finished(process) == status, text(log)
    assert time.monotonic() - sent < 30
    (checkpoint,) = list_checkpoints(run)
    step = checkpoint_step(checkpoint)
    assert f"{says}: stopped after step {step}, saved as {checkpoint}; --resume auto continues it" in text(log)
    assert ("interrupted: finishing the step, saving; Ctrl-C again ends at once" in text(log)) == (says == "Ctrl-C")
    assert "Traceback" not in text(log) and "KeyboardInterrupt" not in text(log)
    assert (run / "loss.png").is_file() and not (run / ".lock").exists()
    changes += ["--training.max_steps", step + 10]
    train(config(run, store, *changes, "--resume", "auto"))
    train(config(tmp_path / "whole", store, *changes))
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.parametrize(("name", "presses"), [("open_task", 1), ("save_checkpoint", 2)])
def test_ctrl_c_before_the_first_step_or_again_ends_at_once(tmp_path, store, name, presses):
    run, log = tmp_path / "runs" / "run", tmp_path / "log"
    process = start(options(run, store), log, asleep_in, name)
    wait_until(lambda: f"in {name}" in text(log))
    os.killpg(process.pid, signal.SIGINT)
    if presses == 2:
        wait_until(lambda: "Ctrl-C again ends at once" in text(log))
        os.killpg(process.pid, signal.SIGINT)
    sent = time.monotonic()
    assert finished(process) == 130
    assert time.monotonic() - sent < 30
    assert text(log).splitlines()[-1] == "train_dit.py: interrupted; there is no checkpoint yet"
    assert "Traceback" not in text(log) and not (run / ".lock").exists()
    assert (tmp_path / "runs").exists() == (presses == 2), "a failed start leaves nothing"


@pytest.mark.slow
def test_a_data_worker_that_is_killed(tmp_path, store):
    run, log = tmp_path / "run", tmp_path / "log"
    assert finished(start(options(run, store, "--data.num_workers", 2), log, worker_killed, 6)) == 1, text(log)
    (said,) = [line for line in text(log).splitlines() if line.startswith("train_dit.py: stopped")]
    assert re.search(r"reads data died \(DataLoader worker \(pid.*step-0000004.*num_workers", said), said
    assert "Traceback" not in text(log)


@pytest.mark.usefixtures("as_a_command_says_it")
def test_a_run_that_is_where_it_was_to_go_says_so_and_stays_as_it_is(run, store, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for last in (8, 5):
        train(config(run, store, "--training.max_steps", last, "--resume", "auto", "--training.ema_decay", 0.5))
        assert f"{run} is at step 8 of training.max_steps={last} already: nothing to do" in capsys.readouterr().out
        AcceleratorState._reset_state(reset_partial_state=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_folder_that_cannot_be_made(tmp_path, store):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^output_dir=.*file/run.*Not a directory"):
        train(config(tmp_path / "file" / "run", store))


def rewrite_sums(checkpoint):
    path = checkpoint / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": _sums(checkpoint)}))


def test_a_checkpoint_of_another_version_is_refused_by_the_weights_name(run, store):
    newest = list_checkpoints(run)[-1]
    weights = load_file(newest / "model.safetensors")
    name = next(key for key in weights if key.endswith("mixer.scale"))
    save_file(weights | {name: weights[name][:, :1].clone()}, newest / "model.safetensors")
    rewrite_sums(newest)
    with pytest.raises(InputError, match=rf"{re.escape(name)} has shape \(4, 1\), the model's has .*train anew"):
        train(config(run, store, *RESUME))
