"""Tiny training runs, in this process or in several: their options, and what they leave."""

import csv
import time
from pathlib import Path

from gspn_dit.config import Config
from gspn_dit.options import parse

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "train_dit.py")


def options(run, source, *changes):
    """A tiny run on 4×4 latents: a step is a few milliseconds. Later `--key value` pairs win."""
    given = [
        "--output_dir",
        run,
        "--data.source",
        source,
        "--data.vae",
        "digits",
        "--data.image_size",
        "32",
        "--data.horizontal_flip",
        "false",
        "--data.num_workers",
        "0",
        "--model.name",
        "gspn-dit-ti-1",
        "--model.overrides",
        "{width: 32, depth: 2, num_groups: 2, global_layers: 1, chunk: 2}",
        "--training.max_steps",
        "8",
        "--training.batch_size",
        "4",
        "--training.learning_rate",
        "1e-3",
        "--training.log_every",
        "1",
        "--training.sample_every",
        "0",
        "--training.checkpoint_every",
        "4",
        "--training.trackers",
        "[]",
        "--diffusion.objective",
        "flow",
        "--sampling.num_inference_steps",
        "2",
        "--sampling.num_images",
        "4",
        "--training.mixed_precision",
        "no",
        *changes,
    ]
    return [str(value) for value in given]


def config(run, source, *changes):
    return parse(Config, options(run, source, *changes), exit_on_error=False)


def rows(run):
    with open(Path(run) / "metrics.csv") as file:
        return list(csv.DictReader(file))


def losses(run):
    """Step and exact loss of every line of metrics.csv."""
    return [(int(row["step"]), row["loss"]) for row in rows(run)]


def wait_for(run, lines=1, process=None):
    """Until metrics.csv has that many lines; a process that is given is to live until then."""

    def there():
        if process is not None:
            assert process.poll() is None, f"the run ended: {process.stdout and process.stdout.read()[-4000:]}"
        return (Path(run) / "metrics.csv").is_file() and len(rows(run)) >= lines

    wait_until(there)


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


SCORED = [
    "--evaluation.every",
    2,
    "--evaluation.num_samples",
    12,
    "--evaluation.reference",
    "digits:test",
    "--evaluation.features",
    "digits",
    "--evaluation.batch_size",
    5,
    "--training.checkpoint_every",
    2,
    "--training.max_steps",
    4,
]


def scores(run):
    with open(run / "evaluation.csv") as file:
        return list(csv.DictReader(file))
