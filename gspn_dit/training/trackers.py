"""What accelerate's trackers get beside the figures: the run's name and configuration, and its grids of samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from accelerate import Accelerator

from gspn_dit.config import RunConfig
from gspn_dit.storage.pictures import load_image
from gspn_dit.training.checkpoints import flat_options
from gspn_dit.training.record import Record, note

PROJECT = "gspn-dit"
# What each calls a run's name; of TensorBoard's runs the folder tells.
RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}
LISTS = ("tensorboard", "wandb", "swanlab")  # take several images under a name


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Start the run's trackers, with its name and configuration; every process calls this."""
    options = flat_options(dataclasses.asdict(config))
    name = Path(config.output_dir).resolve().name
    accelerator.init_trackers(
        PROJECT,
        # TensorBoard takes nothing else
        {key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in options.items()},
        {tracker: {argument: name} for tracker, argument in RUN_NAMES.items()},
    )


def track_samples(accelerator: Accelerator, path: Path, step: int) -> None:
    """Give a grid of samples to the trackers that take images."""
    image = load_image(path)
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            images = image[None] if tracker.name in LISTS else image
            tracker.log_images({"samples": images}, step, **layout)


def note_scores(scores: Record, accelerator: Accelerator, row: dict[str, float]) -> None:
    """Add a line to evaluation.csv and give it to the trackers; a failure is warned of."""
    step = int(row["step"])
    note(f"{scores.path.name} has no step {step}", scores.append, row)
    named = {f"evaluation/{name}": row[name] for name in row if name != "step"}
    note(f"the trackers have no step {step}", accelerator.log, named, step)
