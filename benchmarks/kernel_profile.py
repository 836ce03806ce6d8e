"""Which kernels take a GPU's time, and what limits those of the operator.

`python -m benchmarks.kernel_profile --out FOLDER --what WHAT` writes, after each case,

    operator    operator-kernels.md: torch.profiler's times of the operator's kernels, forward and training
    models      model-kernels.md: the same of whole models, blocks compiled, forward and forward with backward
    counters    counters.md: Nsight Compute's counters of the operator's kernels, each case's raw ones in ncu/

`counters` needs `ncu`, which runs this program with `--what calls` once a case, and goes on where it stopped.
"""

from __future__ import annotations

from benchmarks.commands import KernelProfileOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("kernel_profile"))

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.deadline import GO_ON, Deadline
from benchmarks.kernels import kernels_of, short_name
from benchmarks.machine import machine
from benchmarks.result_files import origin, write_text
from benchmarks.scan_cases import Case, cases
from benchmarks.tables import header, row

CALLS = 3
SHOWN = 0.01  # of a call's time; kernels that take less are left out
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
    "InstructionStats",
)
METRICS = ("dram__bytes.sum", "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum")  # in no section of these
# Columns of the table: names of counters, of which the first that is there counts, in what unit, and how many decimals.
COLUMNS: dict[str, tuple[str, float, int]] = {
    "ms": (r"gpu__time_duration\.sum", 1e-6, 3),
    "DRAM, MB": (r"dram__bytes\.sum", 1e-6, 1),
    "of DRAM's peak, %": (r"(gpu__)?dram__?throughput\.avg\.pct_of_peak_sustained_elapsed", 1, 0),
    "issue slots used, %": (r"smsp__issue_active\.avg\.per_cycle_active", 100, 0),
    "tensor pipe, %": (r"sm__(inst_executed_)?pipe_tensor.*\.pct_of_peak_sustained_active", 1, 0),
    "M warp instructions": (r"smsp__inst_executed\.sum", 1e-6, 1),
    "shared-memory bank conflicts, M": (r"l1tex__data_bank_conflicts_pipe_lsu_mem_shared\.sum", 1e-6, 2),
    "registers": (r"launch__registers_per_thread", 1, 0),
    "shared KB a block": (r"launch__shared_mem_per_block", 1e-3, 1),
    "warps active, %": (r"sm__warps_active\.avg\.pct_of_peak_sustained_active", 1, 0),
}
STALLS = r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio"


def chosen(options: Options) -> list[Case]:
    """The cases that are asked for. Raises :class:`SystemExit` for one that there is not."""
    known = {case.key: case for case in cases()}
    unknown = [key for key in options.cases if key not in known]
    if unknown:
        raise SystemExit(f"no such case: {unknown[0]}; there are {'; '.join(known)}")
    return [known[key] for key in options.cases]


def call_of(case: Case, trains: bool) -> Callable[[], object]:
    """A forward pass of a case, or forward and backward."""
    operands = case.operands()
    if not trains:
        return torch.no_grad()(lambda: case.run(operands, "native-cuda"))
    operands = [tensor.requires_grad_() for tensor in operands]
    grad = torch.randn_like(operands[0])
    return lambda: case.train(operands, grad, "native-cuda")


def model_call(name: str, trains: bool) -> Callable[[], object]:
    """A forward pass of a whole model at 256 pixels, blocks compiled, or a forward and backward under autocast."""
    from benchmarks.random_model import random_model  # diffusers, which the operator's kernels do without

    model = random_model(name, "cuda", dtype=None if trains else torch.bfloat16)
    model.compile_repeated_blocks(dynamic=False)
    with torch.device("cuda"):
        latents = torch.randn(64, model.in_channels, 32, 32, dtype=torch.float32 if trains else torch.bfloat16)
        inputs = latents, 1000 * torch.rand(64), torch.randint(model.null_class, (64,))

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=trains):
            y = model(*inputs)
        if trains:
            y.float().square().mean().backward()
            model.zero_grad()
        return y.detach()

    return step if trains else torch.no_grad()(step)


def time_lines(title: str, kernels: dict[str, tuple[float, float]]) -> list[str]:
    """A table of a call's kernels."""
    total = sum(ms for _, ms in kernels.values())
    lines = [f"## {title}", "", *header(["kernel", "function", "launches", "ms", "share"])]
    for name, (launches, ms) in kernels.items():
        if ms >= SHOWN * total:
            lines.append(row([f"`{name[:100]}`", short_name(name), f"{launches:g}", f"{ms:.3f}", f"{ms / total:.0%}"]))
    count = sum(launches for launches, _ in kernels.values())
    return [*lines, row(["all", "", f"{count:g}", f"{total:.3f}", ""]), ""]


def operator_calls(options: Options) -> Iterator[tuple[str, Callable[[], object]]]:
    """The operator's calls, by name."""
    for case in chosen(options):
        for trains in (False, True) if case.trains else (False,):
            yield f"{case.key}, {'training' if trains else 'forward'}", call_of(case, trains)


def model_calls(options: Options) -> Iterator[tuple[str, Callable[[], object]]]:
    """Whole models' calls, by name."""
    for trains in (False, True):
        for name in options.models:
            torch.compiler.reset()
            yield f"{name}, {'forward and backward' if trains else 'forward'}", model_call(name, trains)


def write_times(path: Path, calls: Iterable[tuple[str, Callable[[], object]]]) -> None:
    """Write a table for each call, and all again after each."""
    lines: list[str] = []
    for title, call in calls:
        lines += time_lines(title, kernels_of(call, CALLS))
        print("\n".join(lines[lines.index(f"## {title}") :]), flush=True)
        notes = "By torch.profiler, a call's mean; kernels that take less than 1% of it are left out."
        write_text(path, "\n".join([*lines, notes, "", *origin(machine("cuda"))]))
        del call
        torch.cuda.empty_cache()


def make_calls(options: Options) -> None:
    """What Nsight Compute looks at: one call of each case, with its backward pass if it trains, after one before."""
    for case in chosen(options):
        call = call_of(case, case.trains)
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def count(options: Options) -> None:
    """Let Nsight Compute look at every case that it has not seen, and write the table after each."""
    deadline, folder = Deadline(options.time_budget), Path(options.out) / "ncu"
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("ncu, of Nsight Compute, is not on the PATH")
    folder.mkdir(parents=True, exist_ok=True)
    stopped = False
    for case in chosen(options):
        path = counters_file(folder, case)
        if not path.exists() and not stopped:
            stopped = not run_ncu(ncu, case, path, deadline)
        if path.exists():
            print(f"{case.key}: {path}", flush=True)
        write_counters(options, folder)
    if stopped:
        print(GO_ON)


def counters_file(folder: Path, case: Case) -> Path:
    """Where what Nsight Compute says of a case is kept."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', case.key.lower())}.csv"


def run_ncu(ncu: str, case: Case, path: Path, deadline: Deadline) -> bool:
    """Write the counters of a case's kernels; whether there was time. Raises :class:`SystemExit` if ncu fails."""
    part = path.with_suffix(".part")
    program = [sys.executable, "-m", "benchmarks.kernel_profile", "--what", "calls", "--cases", json.dumps([case.key])]
    for metrics in (["--metrics", ",".join(METRICS)], []):  # a name that this ncu does not know is an error
        command = [ncu, "--profile-from-start", "off", "--csv", "--page", "raw", "--print-units", "base"]
        command += [word for section in SECTIONS for word in ("--section", section)]
        try:
            done = subprocess.run(
                [*command, *metrics, "--log-file", str(part), *program],
                capture_output=True,
                text=True,
                timeout=None if math.isinf(deadline.left) else max(deadline.left, 1),
            )
        except subprocess.TimeoutExpired:
            return False
        if done.returncode == 0:
            part.replace(path)
            return True
    said = part.read_text() if part.exists() else ""
    raise SystemExit(f"ncu failed on {case.key}:\n{said[-2000:]}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")


def counters(text: str) -> list[dict[str, str]]:
    """The launches in what `ncu --csv --page raw` says: counters by name, after lines of its own and one of units."""
    table = [line for line in text.splitlines() if line.startswith('"')]
    return [launch for launch in csv.DictReader(table) if launch["ID"]]


def counter_cells(launch: dict[str, str]) -> list[str]:
    """A launch as a row: its kernel, its blocks and threads, the columns, and the three reasons most waited for."""

    def value(name: str) -> float:
        return float(launch[name].replace(",", ""))

    cells = [short_name(launch["Kernel Name"]), f"{launch['Grid Size']} × {launch['Block Size']}"]
    for pattern, scale, digits in COLUMNS.values():
        found = [name for name in launch if re.fullmatch(pattern, name) and launch[name]]
        cells.append(f"{scale * max(map(value, found)):.{digits}f}" if found else "–")
    stalls = {match[1]: value(name) for name in launch if launch[name] and (match := re.fullmatch(STALLS, name))}
    top = sorted((name for name in stalls if "not_issued" not in name), key=lambda name: -stalls[name])[:3]
    return [*cells, ", ".join(f"{name.replace('_', ' ')} {stalls[name]:.1f}" for name in top) or "–"]


def write_counters(options: Options, folder: Path) -> None:
    """The table of all that Nsight Compute has seen."""
    lines = header(["case", "kernel", "blocks × threads", *COLUMNS, "cycles waited an instruction, most"])
    for case in chosen(options):
        path = counters_file(folder, case)
        for launch in counters(path.read_text()) if path.exists() else ():
            lines.append(row([case.key, *counter_cells(launch)]))
    notes = "By Nsight Compute, one call each, forward before backward; clocks as it sets them, kernels alone."
    write_text(Path(options.out) / "counters.md", "\n".join([*lines, "", notes, "", *origin(machine("cuda"))]))


def main(options: Options) -> None:
    """Profile what is asked for."""
    torch.manual_seed(0)
    out = Path(options.out)
    if options.what == "calls":
        return make_calls(options)
    out.mkdir(parents=True, exist_ok=True)
    if options.what == "counters":
        return count(options)
    if options.what == "models":
        return write_times(out / "model-kernels.md", model_calls(options))
    write_times(out / "operator-kernels.md", operator_calls(options))
