"""Speed of `propagate` against its reference and against softmax attention on the same tokens and heads.

`python -m benchmarks.operator [--repeats 7] [--out FILE.md]` prints one table for the CPU: medians of repeats, random
inputs, all in one run (benchmarks/operator_cpu.py). `--device cuda --out FOLDER` is the table for a GPU, with the byte
floor and a kernel of the published scheme of one launch per line beside it (benchmarks/operator_cuda.py).
"""

from __future__ import annotations

from benchmarks.commands import OperatorOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("operator"))

from pathlib import Path

import torch

from benchmarks import operator_cpu, operator_cuda
from benchmarks.machine import machine
from benchmarks.result_files import write_report
from gspn_dit.ops.registry import find


def main(options: Options) -> None:
    """Time the operator against its peers, in float32 on the CPU or by the list of cases for a GPU."""
    available, detail = find(f"native-{options.device}").status()
    if not available:
        raise SystemExit(f"nothing to measure: {detail}")
    torch.manual_seed(0)
    if options.device == "cuda":
        out = Path(options.out or "benchmarks/results")
        out.mkdir(parents=True, exist_ok=True)
        return operator_cuda.run_cases(out, options.repeats or 50)
    lines = operator_cpu.tables(options.repeats or 7)
    write_report([*lines, "", "CPU float32."], machine(), options.out)
