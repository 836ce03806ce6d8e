"""Tiny classifiers' trainings on made idx files: their data, their options, and what they leave."""

import csv
import gzip
import struct
from pathlib import Path

import numpy as np

from gspn_dit.classifier_config import ClassifierConfig
from gspn_dit.options import parse

ROOT = Path(__file__).parents[2]
SIZE, CLASSES = 12, 3
# Everything that is random: parts of pictures, RandAugment, erasing, mixing, sizes, and the network's own drop path.
EVERYTHING = [
    "--augmentation.crop",
    "resized",
    "--augmentation.max_shift",
    0,
    "--augmentation.rand_augment",
    "rand-m9-mstd0.5-inc1",
    "--augmentation.erasing",
    0.5,
    "--augmentation.mixup",
    0.8,
    "--augmentation.cutmix",
    1.0,
    "--augmentation.sizes",
    "[8, 16]",
    "--augmentation.label_smoothing",
    0.1,
]


def write_idx(path, array):
    """An array of bytes as an idx file, compressed where its name says so."""
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    Path(path).write_bytes(gzip.compress(data) if str(path).endswith(".gz") else data)


def write_idx_folder(folder, images=24, size=SIZE, classes=CLASSES, test_images=10):
    """Made pictures, a bright bar in the place of the class and noise, in the files that MNIST has; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", images), ("t10k", test_images)):
        labels = np.arange(count) % classes
        pixels = rng.integers(0, 80, (count, size, size))
        for picture, label in zip(pixels, labels, strict=True):
            picture[label * size // classes : (label + 1) * size // classes] += 150
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels)
    return folder


def options(run, source, *changes):
    """A tiny run on 12×12 pictures: a step is a few milliseconds. Later `--key value` pairs win."""
    given = [
        "--output_dir",
        run,
        "--model.name",
        "gspn-grouped-pico",
        "--model.overrides",
        "{widths: [16, 32], depths: [1, 2], group_width: 8}",
        "--data.source",
        source,
        "--data.image_size",
        SIZE,
        "--data.num_workers",
        0,
        "--augmentation.crop",
        "shift",
        "--augmentation.max_shift",
        1,
        "--augmentation.color_jitter",
        0,
        "--training.max_steps",
        8,
        "--training.batch_size",
        8,
        "--training.learning_rate",
        1e-3,
        "--training.weight_decay",
        0.05,
        "--training.log_every",
        1,
        "--training.checkpoint_every",
        4,
        "--training.mixed_precision",
        "no",
        "--training.trackers",
        "[]",
        "--evaluation.every",
        4,
        *changes,
    ]
    return [str(value) for value in given]


def config(run, source, *changes):
    return parse(ClassifierConfig, options(run, source, *changes), exit_on_error=False)


def accuracies(run):
    with open(Path(run) / "evaluation.csv") as file:
        return list(csv.DictReader(file))
