"""What each way of guidance does: how many images show their class, and how far they are from real ones.

`python -m benchmarks.guidance [--guides digits=RUN,photos=RUN] [--num-images N] [--out PREFIX]` draws the same images,
same seeds and classes in the same number of steps, with the packaged models, once for each way of guidance, and scores
them. It writes PREFIX.json and PREFIX.md after each row; what is in PREFIX.json, and the images in --images, are kept:
the same command goes on where the last one stopped. Rows of autoguidance are there for data that has a guide: a run of
a smaller model, or one that was cut early, such as

    gspn-dit train --config configs/digits.yaml --training.max-steps 500 --output-dir runs/guide-digits
"""

from __future__ import annotations

from benchmarks.commands import GuidanceOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("guidance"))

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.deadline import GO_ON, Deadline
from benchmarks.machine import machine
from benchmarks.result_files import noted, origin, saved_rows, write_rows, write_text
from benchmarks.tables import figure, header, row
from gspn_dit.autoencoder import downsampling
from gspn_dit.autoencoder.vae import weights_sha256
from gspn_dit.commands import SampleOptions
from gspn_dit.evaluation.evaluate import evaluate, statistics_of
from gspn_dit.evaluation.extractors import create_extractor
from gspn_dit.evaluation.image_sets import open_reference, open_samples
from gspn_dit.inference.loading import load_pipeline, load_transformer
from gspn_dit.inference.sample import main as sample

WAYS: dict[str, dict[str, Any]] = {  # beside the scale, which is the same in all rows but the first
    "none": {"guidance_scale": 1.0},
    "classifier-free": {},
    "in the interval 0.2 to 0.8": {"guidance_interval": (0.2, 0.8)},
    "linear": {"guidance_schedule": "linear"},
    "cosine": {"guidance_schedule": "cosine"},
    "power-cosine, s = 4": {"guidance_schedule": "power-cosine"},
    "rescale, φ = 0.7": {"guidance_rescale": 0.7},
    "APG, η = 0": {"apg_eta": 0.0},
    "APG, η = 0, β = -0.5, r = 2.5": {"apg_eta": 0.0, "apg_momentum": -0.5, "apg_norm_threshold": 2.5},
}


class Results:
    """The rows of a results file: read when it is opened, written after each.

    Raises :class:`InputError` if the file is of other settings.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.path = Path(f"{options.out}.json")
        same = ("num_images", "num_inference_steps", "guidance_scale", "seed")
        weights = {data: weights_sha256(load_transformer(data)) for data in options.data}
        chosen = {key: getattr(options, key) for key in same}
        self.settings = {"machine": machine(), "weights": weights, **chosen}
        self.rows = saved_rows(self.path, self.settings)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def cells(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Every row's key, its data and its options of `gspn-dit sample`."""
        for data in self.options.data:
            ways = dict(WAYS)
            if guide := self.options.guide_of.get(data):
                ways[f"autoguidance by {Path(guide).name}"] = {"guide": guide}
            for way, changes in ways.items():
                yield f"{data}: {way}", data, changes

    def add(self, key: str, measured: dict[str, Any]) -> None:
        """Take in a row, and write both files."""
        self.rows[key] = noted(measured)
        write_rows(self.path, self.settings, self.rows)
        write_text(self.path.with_suffix(".md"), report(self))


class Score:
    """How images of one data are scored, by its packaged classifier."""

    def __init__(self, data: str) -> None:
        self.extractor = create_extractor(data)
        pipe = load_pipeline(data)
        height, width = (side * downsampling(pipe.vae) for side in pipe.latent_size())
        self.size = (height, width)
        self.reference = statistics_of(open_reference(data, self.size), self.extractor, quick=True)

    def __call__(self, folder: Path) -> dict[str, float]:
        """`class_accuracy` and `fd` of a folder of samples."""
        found = evaluate(open_samples(str(folder)), self.reference, self.extractor, quick=True)
        return {name: found[name] for name in ("class_accuracy", "fd")}


def draw(options: Options, key: str, data: str, changes: dict[str, Any]) -> Path:
    """Draw a row's images, or those of them that are not there yet, and return their folder."""
    name = "".join(letter if letter.isalnum() else "-" for letter in key)
    folder = Path(options.images, Path(options.out).name, name)
    given = {
        "model": data,
        "num_images": options.num_images,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "out": f"{folder}/",
        "mixed_precision": "no",
        "device": "cpu",
    }
    sample(SampleOptions(**given | changes))
    return folder


def report(results: Results) -> str:
    """The table, and what it is of."""
    options = results.options
    lines = [
        "# Ways of guidance",
        "",
        f"{options.num_images} images of each row, the same seeds and classes, {options.num_inference_steps} steps of "
        f"the model's sampler, guidance scale {options.guidance_scale:g} where there is guidance.",
        "FD is the Fréchet distance of the packaged classifier's features to those of all training images.",
        "",
        *header(["data", "guidance", "recognised as the class asked for", "FD"]),
    ]
    for key, data, _ in results.cells():
        found = results.rows.get(key)
        accuracy = "–" if found is None else f"{100 * found['class_accuracy']:.1f}%"
        lines.append(row([data, key.partition(": ")[2], accuracy, figure(found, "fd", 1)]))
    return "\n".join([*lines, "", *origin(results.settings["machine"], results.rows.values())])


def main(options: Options) -> None:
    """Draw and score images with each way of guidance."""
    deadline = Deadline(options.time_budget)
    torch.set_num_threads(options.threads)
    results, scores = Results(options), {}
    for key, data, changes in results.cells():
        if key in results.rows:
            continue
        if deadline.passed():
            print(f"{key}: {GO_ON}")
            break
        folder = draw(options, key, data, changes)
        if data not in scores:
            scores[data] = Score(data)
        results.add(key, scores[data](folder))
        print(f"{key}: {results.rows[key]}", flush=True)
    print(report(results))
