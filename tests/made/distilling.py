"""Tiny distillations of tiny teachers: their data, their options, and what they leave."""

import csv
from pathlib import Path

from made.captions import write_captioned
from made.stable_diffusion import tiny_sd2, tiny_sd_pipeline, tiny_sdxl_pipeline

from gspn_dit.commands import EncodeTextToImageOptions
from gspn_dit.data.encode_t2i import main as encode
from gspn_dit.distillation_config import DistillationConfig
from gspn_dit.options import parse

SIZE = 16  # pixels; 8 × 8 latents
CAPTIONS = [f"a {colour} {digit}" for colour in ("red", "blue", "green") for digit in range(4)]
TEACHERS = {
    "sd": tiny_sd_pipeline,
    "sd2": lambda folder: tiny_sd_pipeline(folder, tiny_sd2(), "v_prediction"),
    "sdxl": tiny_sdxl_pipeline,
}


def write_teacher(folder, kind="sd"):
    """A teacher's folder and, beside it, captioned pictures and a store of them by the teacher; what holds them."""
    TEACHERS[kind](folder / kind)
    if not (folder / "pictures").exists():
        write_captioned(folder / "pictures", CAPTIONS, size=(20, 24))
    given = {"image_size": SIZE, "num_workers": 0, "device": "cpu"}
    encode(
        EncodeTextToImageOptions(
            base=str(folder / kind), data=str(folder / "pictures"), out=str(folder / f"{kind}-store"), **given
        )
    )
    return folder


def options(run, base, source, *changes):
    """A tiny run on 8×8 latents. Later `--key value` pairs win."""
    given = {
        "output_dir": run,
        "base": base,
        "replacement.chunk": 4,
        "data.source": source,
        "data.image_size": SIZE,
        "data.num_workers": 0,
        "training.max_steps": 6,
        "training.batch_size": 4,
        "training.learning_rate": 1e-3,
        "training.log_every": 1,
        "training.checkpoint_every": 3,
        "training.trackers": "[]",
        "training.mixed_precision": "no",
    }
    return [str(value) for pair in given.items() for value in (f"--{pair[0]}", pair[1])] + [str(c) for c in changes]


def config(run, base, source, *changes):
    return parse(DistillationConfig, options(run, base, source, *changes), exit_on_error=False)


def parts(run):
    """The lines of evaluation.csv as numbers, by column."""
    with open(Path(run) / "evaluation.csv") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}
