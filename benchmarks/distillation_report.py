"""The tables and pictures of what `benchmarks.distillation` has finished so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.cells import Results, read_results, smoothed
from benchmarks.distillation_cell import PROMPTS, SHOWN, TEACHER, VIEWS, View
from benchmarks.result_files import origin, write_text
from benchmarks.tables import header, row, spread
from gspn_dit.demo.scenes import Scenes
from gspn_dit.storage.files import replacing
from gspn_dit.storage.pictures import load_image

PARTS = ("all", "count", "digits", "colours", "bindings", "places")
NOTES = [
    "Mean ± standard deviation over the seeds: of new weights, of the latents' order, and of the pictures' noise.",
    "Shares in percent of pictures: all that the caption says is true; there are as many things; they are the digits;",
    "the colours; the digits in their colours; they stand where it says. Right: the first of these. Distance: Fréchet",
    "distance to 1,000 real scenes, of 64 features of the packaged classifier of photographs, which sees every picture",
    "at 64 pixels; it is biased by the number of pictures, the same for all mixers. Error: mean square of the UNet's",
    "prediction less the teacher's, on scenes of another seed.",
    "",
]


def write_report(out: Path, mixers: Sequence[str], settings: dict[str, Any]) -> str:
    """Write report.md, losses.png and a picture of each view; return the report."""
    results = read_results(out, mixers)
    lines = []
    if results:
        lines += [*summary(results), "", *details(results), "", *NOTES]
        draw_losses(results, out / "losses.png")
        for view in VIEWS:
            draw_pictures(out, list(results), view)
    lines += [", ".join(f"{key} {value}" for key, value in settings.items()), ""]
    finished = [run for runs in results.values() for run in runs]
    report = "\n".join([*lines, *origin("; ".join(sorted({run["machine"] for run in finished})), finished)])
    write_text(out / "report.md", report)
    return report


def summary(results: Results) -> list[str]:
    """A row per mixer: its parameters, and by view the captions that are right and the distance."""
    errors = next((list(run["errors"]) for runs in results.values() for run in runs if run["errors"]), [])
    columns = [f"{what}, {view.name}" for view in VIEWS for what in ("right", "distance")]
    lines = header(["mixer", "seeds", "new parameters, M", *(f"error, {size}" for size in errors), *columns])
    for mixer, runs in results.items():
        size = f"{runs[0]['parameters'] / 1e6:.3f}" if "parameters" in runs[0] else "–"
        taught = runs[0]["errors"] is not None
        apart = [spread([run["errors"][each] for run in runs], 4) if taught else "–" for each in errors]
        cells = [
            spread([scale * run["views"][view.name][key] for run in runs], digits)
            for view in VIEWS
            for key, scale, digits in (("all", 100, 1), ("fd", 1, 2))
        ]
        lines.append(row([mixer, len(runs), size, *apart, *cells]))
    return lines


def details(results: Results) -> list[str]:
    """A row per mixer and view: which part of the captions is right."""
    lines = header(["mixer", "view", "pictures", *PARTS])
    for mixer, runs in results.items():
        for view in VIEWS:
            of_view = [run["views"][view.name] for run in runs]
            shares = [spread([100 * each[part] for each in of_view], 1) for part in PARTS]
            lines.append(row([mixer, view.name, f"{len(runs)} × {of_view[0]['images']}", *shares]))
    return lines


def draw_losses(results: Results, path: Path) -> None:
    """Each mixer's loss in either stage, the mean of its seeds over windows of a thirtieth of the stage."""
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    stages = {"layerwise": "error over the layer's variance", "run": "loss of the whole UNet"}
    for axes, (stage, label) in zip(figure.subplots(1, 2), stages.items(), strict=True):
        for mixer, runs in results.items():
            lines = [run["losses"][stage] for run in runs if stage in run.get("losses", {})]
            if not lines:
                continue
            axes.plot(*smoothed(lines), label=mixer)
        axes.set(xlabel="step", ylabel=label, yscale="log")
        axes.grid(alpha=0.3, which="both")
        if axes.get_lines():
            axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_pictures(out: Path, mixers: Sequence[str], view: View) -> None:
    """A row per mixer: the same captions and noise, of the first seed; the captions stand above the first row."""
    scenes, folder = Scenes(view.split, seed=PROMPTS), f"pictures/{view.file_name}"
    rows = [mixer for mixer in [TEACHER, *mixers] if (out / mixer / "seed-0" / folder).is_dir()]
    rows = list(dict.fromkeys(rows))
    if not rows:
        return
    figure = Figure(figsize=(2.1 * SHOWN, 2.1 * len(rows) + 0.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(len(rows), SHOWN, squeeze=False)
    for mixer, line in zip(rows, every, strict=True):
        for i, axes in enumerate(line):
            axes.set(xticks=[], yticks=[])
            if (file := out / mixer / "seed-0" / folder / f"{i}.png").is_file():
                axes.imshow(load_image(file), interpolation="nearest")
            if mixer == rows[0]:
                axes.set_title(scenes.caption(i).replace(" and ", "\nand "), fontsize=7)
        line[0].set_ylabel(mixer)
    with replacing(out / f"pictures-{view.file_name}.png") as temporary:
        figure.savefig(temporary, format="png")
