"""Images larger than the models were trained for: how good, how fast, in how much memory, and with which switches.

`python -m benchmarks.higher --models LABEL=RUN,LABEL=RUN --pixels 128,256,512,1024 --features photos [--time-budget
SECONDS] [--out PREFIX]` draws the same images with every model at every size, with and without the noise shift and the
scaled chunks of `sample.py`, and compares them with the real images of the trained size: a crop of that size of every
image, which asks whether the detail is right, and every image as a whole, downsized, which asks whether the subject is.
It writes PREFIX.json, PREFIX.md and PREFIX.png after every row, and in the end PREFIX-images.png, the first image of
every model at every size. What is in PREFIX.json, and the images in --images, are kept: the same command goes on where
the last one stopped. Without --features it measures time and memory alone.
"""

from __future__ import annotations

from benchmarks.commands import HigherOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("higher"))

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from benchmarks.deadline import GO_ON, Deadline
from benchmarks.higher_case import CALLS_FILE, OUT_OF_MEMORY, Case, open_pipeline
from benchmarks.machine import machine
from benchmarks.result_files import noted, origin, saved_rows, write_rows, write_text
from benchmarks.tables import figure, header, row
from gspn_dit.autoencoder import downsampling
from gspn_dit.autoencoder.vae import weights_sha256
from gspn_dit.diffusion import objective_of
from gspn_dit.evaluation.extractors import Extractor, create_extractor
from gspn_dit.evaluation.features import layer_widths, observe
from gspn_dit.evaluation.image_sets import ImageSet, open_reference
from gspn_dit.evaluation.metrics import frechet_distance
from gspn_dit.evaluation.moments import Moments, Statistics
from gspn_dit.inference.sample_folder import image_file
from gspn_dit.options import require
from gspn_dit.storage.files import replacing
from gspn_dit.storage.pictures import load_image

Switches = tuple[Literal["auto"] | None, Literal["auto"] | None]
STYLES: dict[Switches, tuple[str, str]] = {
    (None, None): ("-", "as trained"),
    (None, "auto"): ("--", "chunks scaled"),
    ("auto", None): (":", "shift"),
    ("auto", "auto"): ("-.", "shift, chunks scaled"),
}
COLOURS = ("tab:blue", "tab:red", "tab:orange", "tab:green", "tab:purple", "tab:brown")


class Results:
    """The rows of a results file: read when it is opened, written after each.

    Raises :class:`InputError` if a size is none of a model's, the models' trained sizes or features do not suit each
    other, or the file is of other settings.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.path = Path(f"{options.out}.json")
        weights, self.switches = {}, {}
        for label, source in options.sources.items():
            pipe = open_pipeline(source)
            for pixels in options.pixels:
                pipe.latent_size(pixels, pixels)
            height, width = (side * downsampling(pipe.vae) for side in pipe.latent_size())
            require(height == width, "models", source, f"a model of square images, this one's are {height}×{width}")
            same = getattr(self, "trained", height) == height
            require(same, "models", source, "models of one trained size")
            self.trained = height
            weights[label] = weights_sha256(pipe.transformer, pipe.vae)
            shifts = (None, "auto") if options.shift and objective_of(pipe.scheduler) == "flow" else (None,)
            scales = (None, "auto") if options.chunk_scale and pipe.transformer.has_chunks else (None,)
            self.switches[label] = list(product(shifts, scales))
        self.extractor = create_extractor(options.features, device=options.device) if options.features else None
        if self.extractor and self.extractor.image_size not in (None, self.trained):
            require(False, "features", options.features, f"features of {self.trained} px images, as the models are for")
        same = ("features", "num_images", "guidance_scale", "num_inference_steps", "seed")
        torch.set_num_threads(options.threads)
        chosen = {key: getattr(options, key) for key in same}
        self.settings = {"machine": machine(options.device), "weights": weights, **chosen}
        self.rows = saved_rows(self.path, self.settings)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def cases(self) -> Iterator[tuple[str, Case]]:
        """Every row's key and what it draws, from small images to large, without switches at the trained size."""
        options = self.options
        for pixels, (label, source) in product(options.pixels, options.sources.items()):
            for shift, scale in self.switches[label]:
                if pixels == self.trained and (shift or scale):
                    continue
                name = row_key(label, pixels, shift, scale)
                folder = Path(options.images, Path(options.out).name, name.replace(" ", "-"))
                yield (
                    name,
                    Case(
                        source,
                        pixels,
                        shift,
                        scale,
                        options.num_images,
                        options.seed,
                        options.guidance_scale,
                        options.num_inference_steps,
                        str(folder),
                        options.device,
                        options.threads,
                    ),
                )

    def add(self, key: str, measured: dict[str, Any]) -> None:
        """Take in a row, and write all three files."""
        self.rows[key] = noted(measured)
        write_rows(self.path, self.settings, self.rows)
        write_text(self.path.with_suffix(".md"), report(self))
        with replacing(self.path.with_suffix(".png")) as temporary:
            plot(self, temporary)

    def reference(self) -> Statistics:
        """Of the features of all real training images, computed once."""
        file = Path(self.options.images) / f"reference-{self.options.features}-{self.trained}.safetensors"
        if not file.exists():
            images = open_reference(self.options.features, (self.trained, self.trained))
            found = statistics(images, self.extractor)
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary:
                save_file({"mu": found.mu, "sigma": found.sigma}, temporary)
        return Statistics(**load_file(file))

    def distances(self, case: Case) -> dict[str, float]:
        """Fréchet distances to the real images, of a crop of every image and of every image downsized."""
        if self.extractor is None:
            return {}
        views = {
            "crops": lambda i: crop(image_of(case, i), self.trained, case.seed, i),
            "whole": lambda i: downsized(image_of(case, i), self.trained),
        }
        size = (self.trained, self.trained)
        found = {
            name: statistics(ImageSet(name, case.num_images, size, view), self.extractor)
            for name, view in views.items()
        }
        return {f"fd_{name}": frechet_distance(each, self.reference()) for name, each in found.items()}

    def held_out(self) -> dict[str, float]:
        """The distance that as many real, held-out images have: what a row can hope for."""
        test = open_reference(f"{self.options.features}:test", (self.trained, self.trained))
        count = min(self.options.num_images, len(test))
        spread = np.linspace(0, len(test) - 1, count).round().astype(int)
        images = ImageSet("held out", count, test.image_size, lambda i: test.read(int(spread[i])))
        return {"num_images": count, "fd": frechet_distance(statistics(images, self.extractor), self.reference())}


def row_key(label: str, pixels: int, shift: str | None, scale: str | None) -> str:
    """A row's name in the JSON file."""
    return f"{label} {pixels}px{' shift' if shift else ''}{' chunks' if scale else ''}"


def statistics(images: ImageSet, extractor: Extractor) -> Statistics:
    """Of the features of images."""
    moments = Moments(layer_widths(extractor, images.image_size)[extractor.features], extractor.device)
    observe(images, extractor, [(extractor.features, moments)])
    return moments.statistics()


def image_of(case: Case, i: int) -> np.ndarray:
    """Image i of a case, uint8 (H, W, 3)."""
    return load_image(Path(case.folder) / image_file(i))


def crop(image: np.ndarray, side: int, seed: int, i: int) -> torch.Tensor:
    """A square of an image (H, W, 3), somewhere that is a function of (seed, i), as (3, side, side)."""
    draws = np.random.Generator(np.random.PCG64([seed, i])).random(2)
    top, left = (int(draw * (length - side + 1)) for draw, length in zip(draws, image.shape, strict=False))
    return torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)


def downsized(image: np.ndarray, side: int) -> torch.Tensor:
    """An image (H, W, 3) as (3, side, side), by the bicubic filter that real images are made with."""
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def draw_in_process(case: Case, seconds: float) -> str | None:
    """Draw a case's images in a new process; "ok", what went wrong, or None if it takes longer than there is time."""
    arguments = [sys.executable, "-m", "benchmarks.higher_case", json.dumps(asdict(case))]
    try:
        done = subprocess.run(
            arguments, stderr=None if sys.stderr.isatty() else subprocess.PIPE, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode in (-9, OUT_OF_MEMORY):
        return "out of memory"
    if done.returncode:
        raise SystemExit(f"{case.folder}: {done.stderr or 'failed'}")
    return "ok"


def costs(case: Case) -> dict[str, float]:
    """Seconds an image, and how many images a call draws and each one's share of the bytes that it adds."""
    found = json.loads((Path(case.folder) / CALLS_FILE).read_text())
    calls, peak = found["calls"], found["peak"]
    seconds = sum(call["seconds"] for call in calls) / sum(call["images"] for call in calls)
    return {"seconds": seconds, "bytes": peak["bytes"] / peak["images"], "batch": peak["images"]}


def report(results: Results) -> str:
    """The table in Markdown."""
    distances = ["FD of crops", "FD downsized"] if results.extractor else []
    lines = header(
        [
            "image",
            "model",
            "chunks",
            "shift",
            *distances,
            "s per image",
            "MB per image",
            "µs per pixel",
            "bytes per pixel",
        ]
    )
    for key, case in results.cases():
        if (drawn := results.rows.get(key)) is None:
            continue
        factor = f"×{case.pixels / results.trained:g}"
        found = [f"{drawn[name]:.1f}" if name in drawn else "–" for name in ("fd_crops", "fd_whole")[: len(distances)]]
        switches = [factor if on else "–" for on in (case.chunk_scale, case.shift)]
        area = case.pixels**2
        columns = ("seconds", 1), ("bytes", 1e-6), ("seconds", 1e6 / area), ("bytes", 1 / area)
        figures = [figure(drawn, what, scale) for what, scale in columns]
        lines.append(row([f"{case.pixels} px", drawn["model"], *switches, *found, *figures]))
    options = results.options
    lines += [
        "",
        f"Trained size {results.trained} px; images a row: {options.num_images}; steps: "
        f"{options.num_inference_steps or 'the models own'}. MB (10⁶ bytes): the most that drawing and decoding "
        "add to the memory in use, without the weights, over the images drawn together.",
    ]
    if held_out := results.rows.get("held out"):
        lines.append(f"\n{held_out['num_images']} held-out real images: FD {held_out['fd']:.1f}.")
    return "\n".join([*lines, "", *origin(results.settings["machine"], results.rows.values())])


def plot(results: Results, path: Path) -> None:
    """Distances, time and memory by size: a colour a model, a line style a choice of switches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {"fd_crops": "FD of crops", "fd_whole": "FD of images downsized"} if results.extractor else {}
    panels |= {"seconds": "seconds an image", "bytes": "MB an image, above the weights"}
    figure = Figure(figsize=(10, 4 * len(panels) // 2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels) // 2, 2, sharex=True, squeeze=False).flat
    for axis, (what, title) in zip(axes, panels.items(), strict=True):
        for label, colour in zip(results.options.sources, COLOURS, strict=False):
            for switches in results.switches[label]:
                keys = (
                    (pixels, row_key(label, pixels, *(switches if pixels != results.trained else (None, None))))
                    for pixels in sorted(results.options.pixels)
                )
                points = [
                    (pixels, results.rows[key][what] * (1e-6 if what == "bytes" else 1))
                    for pixels, key in keys
                    if what in results.rows.get(key, {})
                ]
                style, words = STYLES[switches]
                axis.plot(
                    *zip(*points, strict=True) if points else ([], []),
                    style,
                    marker=".",
                    color=colour,
                    label=f"{label}, {words}",
                )
        if any(len(drawn.get_xdata()) for drawn in axis.get_lines()):  # nothing drawn yet has no logarithm
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
        if what.startswith("fd") and "held out" in results.rows:
            axis.axhline(results.rows["held out"]["fd"], color="gray", linewidth=1)
            axis.annotate(
                "held-out real images",
                (0.02, results.rows["held out"]["fd"]),
                color="gray",
                fontsize=8,
                xycoords=("axes fraction", "data"),
                va="bottom",
            )
        axis.set_xticks(results.options.pixels, [str(pixels) for pixels in results.options.pixels])
        axis.set_title(title)
        axis.set_xlabel("side of the image, pixels")
        axis.grid(alpha=0.3)
    figure.axes[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Trained at {results.trained} px\n{results.settings['machine']}")
    figure.savefig(path, dpi=120, format="png")


def show(results: Results, path: Path) -> None:
    """The first image of every row without the shift, whole, at one size: a line a model, a column a size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = dict(results.cases())
    lines = [(label, scale) for label, switches in results.switches.items() for shift, scale in switches if not shift]
    sizes = sorted(results.options.pixels)
    figure = Figure(figsize=(2.6 * len(sizes), 2.75 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), len(sizes), squeeze=False).flat
    for axis, ((label, scale), pixels) in zip(axes, product(lines, sizes), strict=True):
        case = cases[row_key(label, pixels, None, scale if pixels != results.trained else None)]
        if not (Path(case.folder) / image_file(0)).exists():
            axis.set_axis_off()
            continue
        axis.imshow(image_of(case, 0))
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(f"{label}, {STYLES[None, scale][1]}, {pixels} px", fontsize=8)
    figure.savefig(path, dpi=80, format="png")


def main(options: Options) -> None:
    """Draw images of models at sizes they were not trained for, and measure how good and how dear they are."""
    deadline = Deadline(options.time_budget)
    results = Results(options)
    if results.extractor and "held out" not in results.rows:
        results.add("held out", results.held_out())
    before = len(results.rows)
    for key, case in results.cases():
        if key in results.rows:
            continue
        left = deadline.left
        ended = draw_in_process(case, left) if left > 0 else None
        if ended is None:
            print(f"{key}: {GO_ON}")
            break
        label = next(label for label, source in options.sources.items() if source == case.model)
        figures = {**costs(case), **results.distances(case)} if ended == "ok" else {"error": ended}
        results.add(
            key,
            {"model": label, "pixels": case.pixels, "shift": case.shift, "chunk_scale": case.chunk_scale, **figures},
        )
        print(f"{key}: {json.dumps(figures)}", flush=True)
    if len(results.rows) > before:
        with replacing(results.path.with_name(f"{results.path.stem}-images.png")) as temporary:
            show(results, temporary)
    print(report(results))
