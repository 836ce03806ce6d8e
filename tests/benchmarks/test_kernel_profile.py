"""benchmarks/kernel_profile.py: its tables, of what the profilers say, with a program in Nsight Compute's place."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest

from benchmarks import kernel_profile
from benchmarks.deadline import GO_ON
from benchmarks.kernel_profile import Options, counter_cells, counters, main, time_lines

CSV = """==PROF== Connected to process 7 (python)
==WARNING== Note: clocks are not fixed
"ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum","dram__bytes.sum",\
"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","smsp__issue_active.avg.per_cycle_active",\
"sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",\
"sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active","smsp__inst_executed.sum",\
"launch__registers_per_thread","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_not_issued_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio"
"","","","","ns","byte","%","inst/cycle","%","%","inst","register/thread","inst","inst","inst","inst","inst"
"0","void map_forward<BFloat16, 1>(Forward<T1>)","(128, 1, 1)","(1,152, 1, 1)","177,984.00","85,000,000","11.81",\
"0.39","12","10","64,800,000","138","1.7","0.5","0.1","9","0.2"
"1","gate_gradients","(256, 1, 1)","(4608, 1, 1)","97000","1","33","0.2","","","1","40","1","2","3","4","0"
"""
NCU = """#!/bin/bash
echo "$*" >>"$0.calls"
if [[ "$*" == *--metrics* ]] && [ -e "$0.fails" ]; then exit 1; fi
while [ "$1" != --log-file ]; do shift; done
cp "$0.csv" "$2"
"""


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """The program in its place: what it was called with is in ncu.calls; with ncu.fails it knows no metric."""
    program = tmp_path / "ncu"
    program.write_text(NCU)
    program.chmod(0o755)
    (tmp_path / "ncu.csv").write_text(CSV)
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    monkeypatch.setattr(kernel_profile, "machine", lambda device: "A Card, torch 2")
    return program


def calls(ncu):
    return ncu.with_suffix(".calls").read_text().splitlines()


def options(tmp_path, **changes):
    return Options(
        **{"what": "counters", "cases": ["256 px, global", "16K px, global"], "out": str(tmp_path / "out")} | changes
    )


def test_counters_are_read_whatever_else_is_said_and_those_that_are_not_there_are_left_out():
    first, second = map(counter_cells, counters(CSV))
    assert first[:2] == ["map_forward", "(1,152, 1, 1) × (128, 1, 1)"]
    row = dict(zip(kernel_profile.COLUMNS, first[2:], strict=False))
    assert (row["ms"], row["DRAM, MB"], row["of DRAM's peak, %"], row["issue slots used, %"]) == (
        "0.178",
        "85.0",
        "12",
        "39",
    )
    assert (row["tensor pipe, %"], row["M warp instructions"], row["registers"]) == ("12", "64.8", "138")
    assert row["shared KB a block"] == "–"
    assert first[-1] == "wait 1.7, long scoreboard 0.5, math pipe throttle 0.2"
    assert len(first) == len(second) == 3 + len(kernel_profile.COLUMNS)


def test_every_case_is_looked_at_once_and_the_table_has_them_all(ncu, tmp_path):
    main(options(tmp_path))
    main(options(tmp_path))
    assert len(calls(ncu)) == 2
    assert '--what calls --cases ["256 px, global"]' in calls(ncu)[0] and "--metrics dram__bytes.sum" in calls(ncu)[0]
    rows = [
        line.split(" | ")[:2] for line in (tmp_path / "out" / "counters.md").read_text().splitlines() if " px, " in line
    ]
    assert rows == [
        [f"| {case}", kernel] for case in options(tmp_path).cases for kernel in ("map_forward", "gate_gradients")
    ]


def test_counters_that_it_does_not_know_are_done_without(ncu, tmp_path):
    ncu.with_suffix(".fails").touch()
    main(options(tmp_path))
    assert ["--metrics" in call for call in calls(ncu)] == [True, False] * 2


def test_one_that_always_fails_says_so_and_leaves_nothing_that_looks_like_a_result(ncu, tmp_path):
    ncu.with_suffix(".csv").unlink()
    with pytest.raises(SystemExit, match="ncu failed on 256 px, global"):
        main(options(tmp_path))
    assert not list((tmp_path / "out" / "ncu").glob("*.csv"))


def test_when_the_time_is_up_what_is_there_is_a_table(ncu, tmp_path, capsys):
    main(options(tmp_path, cases=["256 px, global"]))
    ncu.write_text("#!/bin/bash\nexec sleep 20\n")
    main(options(tmp_path, time_budget=0.1))
    assert capsys.readouterr().out.endswith(f"{GO_ON}\n")
    assert "| 256 px, global | map_forward |" in (tmp_path / "out" / "counters.md").read_text()


def test_without_ncu_or_with_an_unknown_case_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="ncu, of Nsight Compute, is not on the PATH"):
        main(options(tmp_path))
    with pytest.raises(SystemExit, match="no such case: 8 px; there are 256 px, global; "):
        main(options(tmp_path, what="operator", cases=["8 px"]))


def test_kernels_of_a_call_are_in_order_with_their_shares_and_what_takes_next_to_nothing_is_only_counted():
    lines = time_lines("a call", {"void f<1>(int)": (2, 0.75), "g": (1, 0.25), "h": (4, 0.001)})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[2:] == [
        ["`void f<1>(int)`", "f", "2", "0.750", "75%"],
        ["`g`", "g", "1", "0.250", "25%"],
        ["all", "", "7", "1.001", ""],
    ]


def test_a_file_of_times_is_there_after_the_first_call(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_profile, "machine", lambda device: "A Card, torch 2")
    monkeypatch.setattr(kernel_profile, "kernels_of", lambda call, calls: {call: (1, 1.0)})
    monkeypatch.setattr(kernel_profile.torch.cuda, "empty_cache", lambda: None)
    path, seen = tmp_path / "times.md", []

    def named():
        for name in ("first", "second", "third"):
            seen.append(path.read_text().count("## ") if path.exists() else 0)
            yield name, f"kernel_of_{name}"

    kernel_profile.write_times(path, named())
    assert seen == [0, 1, 2]
    headings = [line for line in path.read_text().splitlines() if line.startswith("## ")]
    assert headings == ["## first", "## second", "## third"]
    places = [path.read_text().index(f"kernel_of_{name}") for name in ("first", "second", "third")]
    assert all(one < other for one, other in pairwise(places))
