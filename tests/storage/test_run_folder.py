"""The run folder's layout: what it is on disk, and that it is spelled in one place."""

import ast
from pathlib import Path

import gspn_dit
from gspn_dit.storage import run_folder
from gspn_dit.storage.run_folder import Checkpoint, RunFolder

PACKAGE = Path(gspn_dit.__file__).parent
NAMES = {
    "class_names.json",
    "config.yaml",
    "diffusion_pytorch_model.safetensors",
    "evaluation.csv",
    "loss.png",
    "metadata.json",
    "metrics.csv",
    "metrics.json",
    "model.safetensors",
    "optimizer.safetensors",
}


def test_checkpoints_are_listed_by_step_and_only_when_whole(tmp_path):
    for name in ("step-0000900", "step-10000000", "step-0001000", "step-last", "step-5.tmp", ".step-0002000.tmp"):
        (tmp_path / "checkpoints" / name / "ema").mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "metadata.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-0003000" / "ema").mkdir(parents=True)  # no metadata.json
    (tmp_path / "checkpoints" / "step-0004000").mkdir()
    (tmp_path / "checkpoints" / "step-0004000" / "metadata.json").write_text("{}")  # no ema/
    run = RunFolder(tmp_path)
    assert [checkpoint.step for checkpoint in run.list_checkpoints()] == [900, 1000, 10000000]
    assert run.newest_checkpoint() == Checkpoint(tmp_path / "checkpoints" / "step-10000000")
    assert RunFolder(tmp_path / "nowhere").list_checkpoints() == []
    assert RunFolder(tmp_path / "nowhere").newest_checkpoint() is None


def test_the_layout_is_the_one_of_runs_there_are():
    run = RunFolder(Path("run"))
    checkpoint = run.checkpoint(1000)
    inside = {
        "config.yaml": run.config,
        "class_names.json": run.class_names,
        "metrics.csv": run.metrics,
        "loss.png": run.loss_picture,
        "evaluation.csv": run.evaluation,
        "metrics.json": run.scores,
        "samples/step-0001000.png": run.samples(1000),
        "logs": run.logs,
        "posthoc-ema/config.json": run.snapshots_config,
        "posthoc-ema/step-0001000-sigma-0.05.safetensors": run.snapshot(1000, 0.05).path,
        "checkpoints/step-0001000": checkpoint.path,
        "checkpoints/step-0001000/model.safetensors": checkpoint.weights,
        "checkpoints/step-0001000/optimizer.safetensors": checkpoint.optimizer,
        "checkpoints/step-0001000/ema": checkpoint.ema,
        "checkpoints/step-0001000/ema/config.json": checkpoint.ema_config,
        "checkpoints/step-0001000/ema/diffusion_pytorch_model.safetensors": checkpoint.ema_weights,
        "checkpoints/step-0001000/power-ema-0.05.safetensors": checkpoint.power_ema(0.05),
        "checkpoints/step-0001000/config.yaml": checkpoint.config,
        "checkpoints/step-0001000/class_names.json": checkpoint.class_names,
        "checkpoints/step-0001000/metadata.json": checkpoint.metadata,
    }
    assert {name: Path("run", name) for name in inside} == inside


def test_snapshots_are_listed_by_step_and_width(tmp_path):
    run = RunFolder(tmp_path)
    written = [run.snapshot(step, sigma) for step in (5, 12000000) for sigma in (0.05, 0.1)]
    written[0].path.parent.mkdir()
    for snapshot in reversed(written):
        snapshot.path.touch()
    (written[0].path.parent / "step-0000005-sigma-0.05.safetensors.tmp").touch()
    run.snapshots_config.touch()
    assert run.list_snapshots() == written


def test_a_checkpoint_knows_whether_it_lies_in_a_run(tmp_path):
    inside, outside = RunFolder(tmp_path / "run").checkpoint(4), Checkpoint(tmp_path / "step-0000004")
    for checkpoint in (inside, outside):
        checkpoint.ema.mkdir(parents=True)
        checkpoint.metadata.write_text("{}")
    assert inside.run == RunFolder(tmp_path / "run")
    assert outside.run is None


def test_no_other_module_spells_the_names_of_a_runs_files():
    for path in PACKAGE.rglob("*.py"):
        if path != Path(run_folder.__file__):
            spelled = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            assert not spelled & NAMES, path
