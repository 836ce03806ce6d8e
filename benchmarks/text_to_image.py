"""One call of Stable Diffusion's UNets at random weights, by size: attention, what replaces it, and what bounds that.

`python -m benchmarks.text_to_image --device cuda [--time-budget SECONDS] [--out PREFIX]` calls the UNets of SD-XL and
SD 1.5 for one image with guidance, in slices where `gspn-dit generate` does so, with each mixer in the place of every
self-attention, in turns, and writes PREFIX.json and PREFIX.md as it goes. Two stand-ins take turns too: the
projections of attention alone, and no attention. What PREFIX.json holds is kept: the same command goes on where the
last one stopped. A size that needs more memory than there is has that as its result.

With `--end-to-end true`, SD-XL at random weights generates an image of 16384 × 8192 pixels by what `gspn-dit generate`
runs. On the CPU a layer is measured, not a UNet. Weights do not change time; images are noise.
"""

from __future__ import annotations

from benchmarks.commands import TextToImageOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("text_to_image"))

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.deadline import GO_ON, Deadline
from benchmarks.machine import machine
from benchmarks.result_files import noted, origin, saved_rows, write_rows, write_text
from benchmarks.tables import figure, header, ratio, row
from benchmarks.text_to_image_case import LONGEST_WHOLE, NOTHING, PROJECTIONS, SDPA, counted, measure, subject
from benchmarks.text_to_image_whole import generate, random_pipeline
from gspn_dit.ops.registry import require_kernels

COUNTED, END_TO_END = "counted", "end to end"
SDPAS = (SDPA, "sdpa-cudnn")


def key_of(network: str, size: tuple[int, int], what: str) -> str:
    """The name of a row in the results' JSON."""
    return f"{network}, {size[0]}x{size[1]}, {what}"


class Results:
    """The measurements of a file: read when it is opened, written after each."""

    def __init__(self, options: Options) -> None:
        self.options, self.path = options, Path(f"{options.out}.json")
        self.settings = {"machine": machine(options.device), "dtype": options.dtype, "memory": options.memory}
        self.rows = saved_rows(self.path, self.settings)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, network: str, size: tuple[int, int], what: str, figures: dict[str, Any]) -> None:
        """Take in a row, and write both files."""
        about = {"network": network, "size": f"{size[0]}x{size[1]}", "what": what}
        self.rows[key_of(network, size, what)] = noted({**about, **figures})
        write_rows(self.path, self.settings, self.rows)
        write_text(self.path.with_suffix(".md"), "\n".join(report(self)))

    def get(self, network: str, size: tuple[int, int], what: str) -> dict[str, Any] | None:
        """A row, if it is there."""
        return self.rows.get(key_of(network, size, what))


def report(results: Results) -> list[str]:
    """The tables of all rows, whoever asked for them."""
    rows = list(results.rows.values())
    calls = [each for each in rows if each["what"] != END_TO_END]
    lines = ["# One call of Stable Diffusion's UNets", "", *explained(results.settings), ""]
    for network in dict.fromkeys(each["network"] for each in calls):
        sizes = {tuple(map(int, each["size"].split("x"))) for each in calls if each["network"] == network}
        lines += tables_of(results, network, sorted(sizes, key=lambda size: size[0] * size[1]))
    lines += end_to_end_lines([each for each in rows if each["what"] == END_TO_END])
    return [*lines, *origin(results.settings["machine"], rows)]


def explained(settings: dict[str, Any]) -> Iterator[str]:
    """What the figures are."""
    yield f"One image with guidance at random weights, {settings['dtype']}; memory: {settings['memory']}."
    yield "Medians of calls in turns; pixels are height × width."
    yield f"`{PROJECTIONS}`: attention's four products remain and nothing is between tokens; `{NOTHING}`: none remain."
    yield "Bounds are how many times as fast as softmax attention those two would be, from counted multiplications"
    yield "and as measured; softmax attention is the faster of its kernels."
    yield f"~ stands where a call with softmax attention would take over {LONGEST_WHOLE:.0f} s: it is put together"
    yield "from the projections' call and a share of each layer's queries. Memory is above the weights."


def tables_of(results: Results, network: str, sizes: list[tuple[int, int]]) -> Iterator[str]:
    """The three tables of a network."""
    present = {each["what"] for each in results.rows.values() if each["network"] == network}
    order = dict.fromkeys([*SDPAS, "gspn", *(results.options.mixers or ()), PROJECTIONS, NOTHING])
    variants = [each for each in order if each in present]
    units = {"ms": ("seconds", 1e3), "GB at the peak": ("bytes", 1e-9)}
    for words, (what, scale) in units.items():
        yield from [f"## {network}, {words}", "", *header(["pixels", *variants])]
        for size in sizes:
            found = (results.get(network, size, variant) for variant in variants)
            yield row([f"{size[0]}×{size[1]}", *(cell(each, what, scale) for each in found)])
        yield ""
    names = [
        "pixels",
        "TMACs of an image",
        "gspn over softmax attention",
        "bound 1, counted",
        "bound 1, measured",
        "bound 2, counted",
        "bound 2, measured",
        "gspn's time over the projections'",
    ]
    yield from [f"## {network}, times the speed of softmax attention", "", *header(names)]
    for size in sizes:
        ours, projections, nothing = (results.get(network, size, each) for each in ("gspn", PROJECTIONS, NOTHING))
        attention, macs = faster(results, network, size), (results.get(network, size, COUNTED) or {}).get("macs")
        cells = ["–"] * 3
        if macs is not None:
            bounds = (f"{macs[SDPA] / macs[each]:.3g}×" if macs[each] else "–" for each in (PROJECTIONS, NOTHING))
            cells = [f"{macs[SDPA] / 1e12:.4g}", *bounds]
        yield row(
            [
                f"{size[0]}×{size[1]}",
                cells[0],
                ratio(attention, ours),
                cells[1],
                ratio(attention, projections),
                cells[2],
                "–" if macs is not None and not macs[NOTHING] else ratio(attention, nothing),  # a layer has no rest
                ratio(ours, projections),
            ]
        )
    yield ""


def cell(measured: dict[str, Any] | None, what: str, scale: float) -> str:
    """A figure; – also where a row has others alone."""
    return "–" if measured is None or not {what, "error"} & set(measured) else figure(measured, what, scale)


def faster(results: Results, network: str, size: tuple[int, int]) -> dict[str, Any] | None:
    """Softmax attention by the faster of its kernels."""
    found = [each for name in SDPAS if (each := results.get(network, size, name)) and "seconds" in each]
    return min(found, key=lambda each: each["seconds"], default=None)


def end_to_end_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table of whole images."""
    if not rows:
        return
    yield from ["## From a text to a file, SD-XL with line scans", ""]
    names = ["pixels", "steps", "s to draw", "s to decode and write", "GB at the peak, weights with it"]
    yield from header([*names, "GB taken from the card"])
    for each in rows:
        parts = [cell(each, what, 1) for what in ("drawing", "decoding")]
        sizes = [cell(each, what, 1e-9) for what in ("peak_bytes", "reserved_bytes")]
        yield row([each["size"].replace("x", "×"), each["steps"], *parts, *sizes])
    yield ""


def asked_for(options: Options) -> list[tuple[str, tuple[int, int], str]]:
    """Every row by its network, size and what it is, in the order of measuring."""
    if options.end_to_end:
        return [("SD-XL", size, END_TO_END) for size in options.pixels]
    what = [COUNTED, PROJECTIONS, *options.mixers, NOTHING]
    return [(network, size, each) for network in options.networks for size in options.pixels for each in what]


def main(options: Options) -> None:
    """Measure every network at every size, or generate images; what is there already is not measured again."""
    require_kernels(torch.device(options.device))
    torch.set_num_threads(options.threads)
    results, deadline = Results(options), Deadline(options.time_budget)
    if options.end_to_end:
        generate_all(results, deadline)
    else:
        for network in options.networks:
            measure_network(results, network, deadline)
    print("\n".join(report(results)))
    if any(results.get(*each) is None for each in asked_for(options)):
        print(GO_ON)


def measure_network(results: Results, network: str, deadline: Deadline) -> None:
    """Measure one network at every size."""
    options = results.options
    missing: dict[tuple[int, int], list[str]] = {}
    for name, size, what in asked_for(options):
        if name == network and results.get(name, size, what) is None:
            missing.setdefault(size, []).append(what)
    if not missing or deadline.passed():
        return
    measured = subject(network, options, options.device)
    on_meta = subject(network, replace(options, mixers=[SDPA], memory="off"), "meta")
    for size, todo in missing.items():
        if deadline.passed():
            return
        if COUNTED in todo:
            results.add(network, size, COUNTED, {"macs": counted(on_meta, size)})
        macs = results.get(network, size, COUNTED)["macs"][SDPA]

        def done(what: str, figures: dict[str, Any], size: tuple[int, int] = size) -> None:
            results.add(network, size, what, figures)
            print(f"{key_of(network, size, what)}: {cell(figures, 'seconds', 1e3)} ms", flush=True)

        measure(measured, size, [each for each in todo if each != COUNTED], macs, done, deadline.passed)


def generate_all(results: Results, deadline: Deadline) -> None:
    """Generate an image of every size that has none."""
    options, pipe = results.options, None
    for size in options.pixels:
        if deadline.passed():
            return
        if results.get("SD-XL", size, END_TO_END) is None:
            pipe = pipe or random_pipeline(options)
            figures = generate(pipe, size, options)
            results.add("SD-XL", size, END_TO_END, {"steps": options.num_inference_steps, **figures})
