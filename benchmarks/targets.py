"""What is reached of what the GPU's figures are to be: targets, landed figures, predictions and those of a folder.

`python -m benchmarks.targets --results FOLDER` reads operator-cuda.json, resolution-cuda.json, classifiers-*.json
and text-to-image-*.json, which the parts `operator`, `models`, `classifier` and `t2i` of benchmarks/gpu.sh write there,
and benchmarks/targets.yaml, which has the other figures, and prints a row for each target. It needs no GPU.
"""

from __future__ import annotations

from benchmarks.commands import TargetsOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("targets"))

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.result_files import write_text
from benchmarks.tables import header, row

FILES = {  # what the benchmarks call theirs
    "operator": "operator",
    "models": "resolution",
    "UNets": "text-to-image",
    "whole image": "text-to-image-whole",
}
FIGURES = Path(__file__).with_name("targets.yaml")
NOTES = [
    "Attention is measured in DiT's own layout. The landed figure at 256 px is in that layout too, those at 512 and "
    "1024 px are on contiguous heads; each prediction is of the same layout as its landed figure.",
    "Predictions are computed, not measured: shares and ratios from docs/kernels.md, the forward of XL at 256 px from "
    "one block in docs/performance.md.",
    "The bound of a UNet is its call with attention's four projections alone, measured in turns with line scans.",
    "Speed at equal MACs is images a second times the MACs of an image, of the faster of eager and compiled.",
]
Rows = dict[str, dict[str, Any]]  # of a results file, by their keys
Results = dict[str, Rows]  # by the benchmark


@dataclass(frozen=True)
class Target:
    """How a row is measured, and how its figures are written.

    Args:
        measure: The figure in the results by benchmark; None where they lack it.
        form: As of :func:`format`.
        at_most: Whether less is better.
    """

    measure: Callable[[Results], float | None]
    form: str = ".2f"
    at_most: bool = False

    def write(self, figure: float | None) -> str:
        """A figure in the table."""
        return "–" if figure is None else format(figure, self.form)

    def reached(self, figure: float, reach: float) -> bool:
        """Whether a figure is as good as it is to be."""
        return figure <= reach if self.at_most else figure >= reach


def share(case: str, results: Results) -> float | None:
    """The byte floor over the forward pass of a case."""
    found = results["operator"].get(case, {})
    return found["floor_ms"] / found["ours"]["forward"]["device_ms"] if "ours" in found else None


def over_forward(case: str, results: Results) -> float | None:
    """Forward and backward over forward."""
    ours = results["operator"].get(case, {}).get("ours", {})
    return ours["both"]["device_ms"] / ours["forward"]["device_ms"] if "both" in ours else None


def against_attention(case: str, results: Results) -> float | None:
    """The faster kernel of attention over our forward pass."""
    found = results["operator"].get(case, {})
    peers = [timing["forward"]["device_ms"] for timing in found.get("attention", {}).values() if "forward" in timing]
    return min(peers) / found["ours"]["forward"]["device_ms"] if peers else None


def fastest(models: Rows, model: str, step: str, pixels: int) -> dict[str, Any] | None:
    """The row of a model's fastest settings."""
    found = [
        measured
        for measured in models.values()
        if (measured["model"], measured["step"], measured["pixels"]) == (model, step, pixels) and "seconds" in measured
    ]
    return min(found, key=lambda measured: measured["seconds"], default=None)


def against_dit(what: str, step: str, pixels: int, results: Results) -> float | None:
    """DiT's seconds over ours; of bytes, ours over DiT's."""
    dit, ours = (fastest(results["models"], model, step, pixels) for model in ("DiT", "GSPN-DiT"))
    if dit is None or ours is None:
        return None
    return dit[what] / ours[what] if what == "seconds" else ours[what] / dit[what]


def against_swin(which: str, pixels: int, results: Results) -> float | None:
    """Ours over Swin-T in images a second times multiply-accumulates of an image."""
    figures = []
    for name in ("gspn-grouped-t", "swin_tiny_patch4_window7_224"):
        found = [
            measured["images_per_second"] * measured["macs"]
            for measured in results["classifiers"].values()
            if (measured["name"], measured["pass"], measured["pixels"]) == (name, which, pixels)
        ]
        if not found:
            return None
        figures.append(max(found))
    return figures[0] / figures[1]


def over_bound(network: str, size: str, results: Results) -> float | None:
    """Seconds of a UNet's call with line scans over those with attention's projections alone."""
    found = [results["UNets"].get(f"{network}, {size}, {what}", {}) for what in ("gspn", "projections alone")]
    return found[0]["seconds"] / found[1]["seconds"] if all("seconds" in each for each in found) else None


def taken_from_the_card(results: Results) -> float | None:
    """GB (10⁹ bytes) that torch takes to generate 16384 × 8192 pixels."""
    found = results["whole image"].get("SD-XL, 8192x16384, end to end", {})
    return found["reserved_bytes"] / 1e9 if "reserved_bytes" in found else None


def targets() -> dict[str, Target]:
    """Every row by its name in targets.yaml."""
    gspn_2 = "GSPN-2: 1024², 8 ch, global"
    cases = {f"{pixels} px": f"{pixels} px, global" for pixels in (256, 512, 1024, 2048)}
    shares = cases | {"16K px, chunk 32": "16K px, chunk 32", "16K px": "16K px, global"}
    shares |= {"GSPN-2's configuration": gspn_2}
    rows = {
        f"operator, share of the floor: {name}": Target(partial(share, case), ".0%") for name, case in shares.items()
    }
    for name, case in {**cases, "GSPN-2's configuration": gspn_2}.items():
        rows[f"forward and backward over forward: {name}"] = Target(partial(over_forward, case), ".1f", at_most=True)
    for name in ("256 px", "512 px", "1024 px"):
        rows[f"operator, times the speed of attention: {name}"] = Target(partial(against_attention, cases[name]), ".1f")
    for step, words, sizes in (
        ("forward", "XL forward", (256, 512, 1024, 4096, 16384)),
        ("training", "XL training step", (256, 512, 1024)),
    ):
        for pixels in sizes:
            measure = partial(against_dit, "seconds", step, pixels)
            rows[f"{words}, times the speed of DiT-XL/2: {pixels} px"] = Target(measure)
    memory = partial(against_dit, "bytes", "training", 256)
    rows["memory that a training step adds, over DiT-XL/2's: 256 px"] = Target(memory, at_most=True)
    for which in ("forward", "training step"):
        for pixels in (224, 1024):
            name = f"gspn-grouped-t {which}, times the speed of swin_tiny at equal MACs: {pixels} px"
            rows[name] = Target(partial(against_swin, which, pixels))
    for network in ("SD-XL", "SD 1.5"):
        for size in ("2048x2048", "4096x4096", "8192x8192", "8192x16384"):
            name = f"UNet of {network} with line scans, times the bound: {size.replace('x', ' x ')} px"
            rows[name] = Target(partial(over_bound, network, size), at_most=True)
    rows["SD-XL generates 16384 x 8192 px, GB of the card"] = Target(taken_from_the_card, ".0f", at_most=True)
    return rows


def read(path: Path) -> dict[str, Any]:
    """A results file; one without rows where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """The results files of a folder by their benchmark; those of classifiers, one for each size, as one."""
    found = {name: read(folder / f"{file}-cuda.json") for name, file in FILES.items()}
    classifiers: dict[str, Any] = {"rows": {}}
    for path in sorted(folder.glob("classifiers-*.json")):
        one = read(path)
        classifiers = {**one, "rows": {**classifiers["rows"], **one["rows"]}}
    return {**found, "classifiers": classifiers}


def table(results: Path) -> list[str]:
    """The table, what it comes to, and what its figures are of."""
    measured_in = read_all(results)
    rows = {name: of["rows"] for name, of in measured_in.items()}
    figures = yaml.safe_load(FIGURES.read_text())
    lines = header(["what", "landed", "to reach", "predicted (not measured)", "measured", "reached"])
    words: dict[str, list[str]] = {"yes": [], "no": [], "not measured": []}
    for name, target in targets().items():
        known = figures[name]
        measured = target.measure(rows)
        said = "not measured"
        if measured is not None:
            said = "yes" if target.reached(measured, known["reach"]) else "no"
        words[said].append(name)
        reach = f"{'at most ' if target.at_most else ''}{target.write(known['reach'])}"
        cells = target.write(known["landed"]), reach, target.write(known["predicted"]), target.write(measured)
        lines.append(row([name, *cells, said]))
    for note in NOTES:
        lines += ["", note]
    lines += ["", f"Reached: {len(words['yes'])} of {len(figures)}; not measured: {len(words['not measured'])}."]
    for name, of in measured_in.items():
        if of["rows"]:
            code = {found.get("revision") or of.get("revision", "not noted") for found in of["rows"].values()}
            lines += ["", f"{name}: {of['machine']}. Code: {', '.join(sorted(code))}."]
    return lines


def main(options: Options) -> None:
    """Print the table, and write it where it is asked for."""
    text = "\n".join(table(Path(options.results)))
    print(text)
    if options.out is not None:
        write_text(options.out, text)
