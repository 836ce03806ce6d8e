"""The CUDA rows of benchmarks/operator.py: ours against the byte floor and its peers, all in one run on one device.

Every case is first compared with the reference, then timed as replays of CUDA graphs (benchmarks/timing.py). What
benchmarks/targets.yaml asks for comes first; what each case costs on slow peers comes when all cases have been timed.
"""

from __future__ import annotations

import ctypes
import functools
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels import kernels_of, short_name
from benchmarks.machine import machine
from benchmarks.memory import peak_bytes
from benchmarks.result_files import origin, write_rows, write_text
from benchmarks.revision import is_commit, revision
from benchmarks.scan_cases import DEVICE, Case, cases
from benchmarks.tables import header, row
from benchmarks.timing import device_ms, timed
from gspn_dit.layers.norm import group_rms_norm
from gspn_dit.ops import Call
from gspn_dit.ops.build import architectures, cuda_home
from gspn_dit.ops.reference import DIRECTIONS, propagate_reference

HEAD = 64  # channels a head of the attention on the same tokens
ATTENTIONS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
LONGEST_ATTENTION = 128 * 128  # tokens; beyond it a call takes seconds
LONGEST_REFERENCE = 128  # lines; beyond it the reference's lists of lines take more memory than there is
LARGEST_CHECKED = 10**8  # elements of all scans of an image, which the reference keeps in float64 many times over
MOST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # rounding makes 4e-7 to 3e-6 and 2e-3


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second of a large device-to-device copy, counting those read and those written."""
    source = torch.randn(1 << 29, device=DEVICE)  # 2 GB
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * device_ms([lambda: target.copy_(source)], repeats))


def input_sets(make: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """As many sets of operands as it takes to be larger than the cache together, in turns."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [make()]
    while len(sets) < 8 and len(sets) * sum(tensor.nbytes for tensor in sets[0]) < 4 * cache:
        sets.append(make())
    return sets


def errors(case: Case) -> dict[str, float]:
    """‖ours - reference‖ / ‖reference‖ for the batch's first image, of y and, if the case trains, of every gradient.

    Ours runs on the whole batch; the reference, in float64, on that image.
    """
    operands = [tensor.requires_grad_() for tensor in case.operands()]
    factors = 2 * case.factors + case.tail  # they come last, and have no batch
    grad = torch.zeros_like(operands[0])
    grad[:1] = torch.randn_like(grad[:1])
    y = case.run(operands, "native-cuda")
    gots = [y.detach(), *(torch.autograd.grad(y, operands, grad) if case.trains else ())]
    of_an_image = len(operands) - factors
    exact = [tensor.detach()[: 1 if i < of_an_image else None].double() for i, tensor in enumerate(operands)]
    exact = [tensor.requires_grad_() for tensor in exact]
    *gated, decay, scale, direct = case.arguments(exact)
    directions = [list(DIRECTIONS).index(direction) for direction in case.directions]
    cut: dict[str, Any] = {"window": case.window, "shift": case.shift} if case.window else {"chunk": case.chunk or 0}
    y = propagate_reference(Call(*gated, None, decay, scale, **cut, directions=directions))
    if direct is not None:
        y = group_rms_norm(y, case.groups) + direct * exact[0]
    wants = [y.detach(), *(torch.autograd.grad(y, exact, grad[:1].double()) if case.trains else ())]
    names = [
        "y",
        "x",
        *(["gates and λ"] if case.groups < case.channels else ["gates", "λ"]),
        *("f", "s") * case.factors,
        "d",
    ]
    return {
        name: ((got[: len(want)].double() - want).norm() / want.norm()).item()
        for name, got, want in zip(names, gots, wants, strict=False)
    }


def checked(case: Case) -> dict[str, float] | None:
    """The errors, None where the reference would be too large. Raises :class:`ArithmeticError` for a wrong result."""
    if case.side**2 * case.channels * len(case.directions) > LARGEST_CHECKED:
        return None
    found = errors(case)
    wrong = {name: error for name, error in found.items() if not error < MOST_ERROR[case.dtype]}  # NaN is wrong
    if wrong:
        words = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise ArithmeticError(f"differs from the reference: {words} of its norm")
    return found


def time_ours(case: Case, backend: str, repeats: int, trains: bool) -> dict[str, Any]:
    """The forward pass, and forward and backward: their times and what a call adds to the memory in use."""
    sets = input_sets(case.operands)
    with torch.no_grad():
        calls = [partial(case.run, operands, backend) for operands in sets]
        graphs = backend == "native-cuda"  # the reference writes a mask from the host, which no capture permits
        result = {"forward": asdict(timed(calls, repeats, graphs)), "peak_bytes": peak_bytes(DEVICE, calls[0])}
    if trains:
        grad = torch.randn_like(sets[0][0])
        for operands in sets:
            for tensor in operands:
                tensor.requires_grad_()
        calls = [partial(case.train, operands, grad, backend) for operands in sets]
        result |= {"both": asdict(timed(calls, repeats)), "both_peak_bytes": peak_bytes(DEVICE, calls[0])}
    return result


def time_attention(case: Case, repeats: int) -> dict[str, Any]:
    """Attention in bf16 on the same tokens, heads of 64 channels, by every backend; none where it would take long.

    Queries, keys and values lie as DiT's product makes them, (B, N, 3, heads, D), and so do their gradients.
    """
    tokens = case.side**2
    if tokens > LONGEST_ATTENTION or case.channels % HEAD:
        return {}
    shape = case.batch, tokens, 3, case.channels // HEAD, HEAD

    def make() -> list[Tensor]:
        return [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)]

    def forward(packed: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in packed.unbind(2)))

    def train(packed: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(packed), packed, grad)

    sets = [packed for (packed,) in input_sets(make)]
    grad = torch.randn_like(sets[0][:, :, 0]).transpose(1, 2)

    def time(backend: SDPBackend) -> dict[str, Any]:
        with sdpa_kernel(backend):
            with torch.no_grad():
                alone = timed([partial(forward, packed) for packed in sets], repeats)
            return {
                "forward": asdict(alone),
                "both": asdict(timed([partial(train, packed) for packed in sets], repeats)),
            }

    return {name: attempt(partial(time, backend)) for name, backend in ATTENTIONS.items()}


def attempt(peer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A peer's figures, or why there are none: not for this device, shape or torch, not compiled, or out of memory."""
    try:
        return peer()
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return {"error": str(error).splitlines()[0]}


class PerLine:
    """benchmarks/per_line.cu: one launch a line, as GSPN-1's published kernel."""

    @functools.cached_property
    def library(self) -> ctypes.CDLL:
        """The kernel, compiled when it is first asked for."""
        source = Path(__file__).with_name("per_line.cu")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "per_line.so"
            nvcc, arch = cuda_home() / "bin" / "nvcc", architectures()[0].replace(".", "").removesuffix("+PTX")
            flags = ["-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{arch}"]
            subprocess.run([nvcc, *flags, source, "-o", path], check=True)
            return ctypes.CDLL(str(path))

    def time(self, case: Case, repeats: int) -> dict[str, Any]:
        """All directions' scans; the maps' turns, the normalisation, u, f and s are not counted."""
        shape = case.batch * case.channels, case.side, case.side
        if 6 * case.dtype.itemsize * torch.Size(shape).numel() > 60e9 or case.dtype == torch.float16:
            return {"error": "too large"}
        scan = getattr(self.library, f"scan_{str(case.dtype).removeprefix('torch.')}")

        def make() -> list[Tensor]:
            x, input_gate, h, *weights = (torch.rand(shape, dtype=case.dtype, device=DEVICE) for _ in range(6))
            return [x, *(weight.div_(3) for weight in weights), input_gate, h]

        def run(tensors: list[Tensor]) -> None:
            pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for _direction in case.directions:
                error = scan(*pointers, ctypes.c_int64(shape[0]), case.side, case.side, stream)
                if error:
                    raise RuntimeError(f"CUDA error {error}")

        return asdict(timed([partial(run, tensors) for tensors in input_sets(make)], max(3, repeats // 5)))


def measure(case: Case, bandwidth: float, repeats: int) -> dict[str, Any]:
    """A row's figures of ours and of attention; a peer that can't run at this size is None."""
    figures = {
        "case": case.name,
        "batch": case.batch,
        "side": case.side,
        "channels": case.channels,
        "groups": case.groups,
        "scans": case.scans,
        "directions": len(case.directions),
        "dtype": str(case.dtype).removeprefix("torch."),
        "floor_bytes": case.floor_bytes,
        "floor_ms": 1e3 * case.floor_bytes / bandwidth,
    }
    figures["errors"] = checked(case)
    torch.cuda.empty_cache()
    figures["ours"] = time_ours(case, "native-cuda", repeats, case.trains)
    torch.cuda.empty_cache()
    figures["attention"] = time_attention(case, repeats)
    return figures


def measure_peers(case: Case, per_line: PerLine, repeats: int) -> dict[str, Any]:
    """A row's figures of what is slower by far; None where it can't run at this size."""
    figures: dict[str, Any] = {"per_line": attempt(lambda: per_line.time(case, repeats)), "reference": None}
    if case.side <= LONGEST_REFERENCE:
        few = max(3, repeats // 10)
        figures["reference"] = attempt(lambda: time_ours(case, "reference", few, trains=False)["forward"])
    return figures


def kernel_names(case: Case) -> dict[str, Any]:
    """The kernels of the operator's call, and of a training call those that the former does not have."""
    operands = case.operands()
    with torch.no_grad():
        forward = kernels_of(partial(case.run, operands, "native-cuda"))
    named = {"forward": list(dict.fromkeys(map(short_name, forward)))}
    if case.trains:
        operands = [tensor.requires_grad_() for tensor in operands]
        both = kernels_of(partial(case.train, operands, torch.randn_like(operands[0]), "native-cuda"))
        named["backward"] = list(dict.fromkeys(short_name(name) for name in both if name not in forward))
    return {"kernels": named}


COLUMNS = (
    "case",
    "B, side, C, G",
    "scans",
    "forward ms",
    "floor ms",
    "fraction",
    "× attention",
    "× per line",
    "× reference",
    "fwd+bwd ms",
    "over forward",
    "× attention fwd+bwd",
    "eager ms, forward / fwd+bwd",
    "peak GB, forward / fwd+bwd",
    "largest error",
    "kernels",
)
NOTES = (
    "Times are of replayed CUDA graphs, on inputs in turns that the cache can't hold; (eager) marks a peer that can't "
    "be captured. Eager ms: a call from Python, back to back, as training without graphs makes it. Attention: the "
    "faster of torch's flash and cuDNN kernels, in DiT's layout. Peak: what a call adds to the memory in use. Largest "
    "error: of y and the gradients, against the reference in float64 on the batch's first image, relative to the norm."
)


def markdown(figures: dict[str, Any]) -> str:
    """A row of the table."""
    ours, none = figures["ours"], {"device_ms": None}
    forward, both = ours["forward"], ours.get("both", none)

    def ratio(peer: dict[str, Any] | None, mine: dict[str, Any], name: str = "") -> str:
        if peer is None or "error" in peer or mine["device_ms"] is None:
            return "–"
        words = [name] if name else []
        if not peer["captured"]:
            words.append("eager")
        return f"{peer['device_ms'] / mine['device_ms']:.1f}" + (f" ({', '.join(words)})" if words else "")

    def attention(part: str, mine: dict[str, Any]) -> str:
        timings = {name: timing[part] for name, timing in figures["attention"].items() if part in timing}
        if not timings:
            return "–"
        name = min(timings, key=lambda name: timings[name]["device_ms"])
        return ratio(timings[name], mine, name)

    def number(value: float | None, form: str = ".3f") -> str:
        return "–" if value is None else format(value, form)

    cells = [
        f"{figures['case']} ({figures['dtype']}, {figures['directions']} directions)",
        f"{figures['batch']}, {figures['side']}, {figures['channels']}, {figures['groups']}",
        figures["scans"],
        number(forward["device_ms"]) + ("" if forward["captured"] else " (eager)"),
        number(figures["floor_ms"]),
        f"{figures['floor_ms'] / forward['device_ms']:.0%}",
        attention("forward", forward),
        ratio(figures.get("per_line"), forward),
        ratio(figures.get("reference"), forward),
        number(both["device_ms"]) + ("" if both.get("captured", True) else " (eager)"),
        number(both["device_ms"] and both["device_ms"] / forward["device_ms"], ".1f"),
        attention("both", both),
        f"{number(forward['eager_ms'])} / {number(both.get('eager_ms'))}",
        " / ".join(number(b and b / 1e9, ".2f") for b in (ours["peak_bytes"], ours.get("both_peak_bytes"))),
        number(figures["errors"] and max(figures["errors"].values()), ".0e"),
        "; ".join(", ".join(names) for names in figures.get("kernels", {}).values()) or "–",
    ]
    return row(cells)


class Table:
    """OUT/operator-cuda.json and .md, written anew after each figure, so that a run cut short leaves what it has.

    A later run of the same commit on the same card goes on from there.
    """

    def __init__(self, out: Path, repeats: int) -> None:
        self.path, where, bandwidth = out / "operator-cuda.json", machine(DEVICE), copy_bandwidth(repeats)
        self.settings = {"machine": where, "cuda": torch.version.cuda, "revision": revision()}
        self.bandwidth, self.failed = bandwidth, {}
        self.footer = [f"Device-to-device copy {bandwidth / 1e12:.2f} TB/s, read and written.", "", *origin(where)]
        saved = json.loads(self.path.read_text()) if self.path.exists() else {"rows": {}}
        same = all(saved.get(key) == value for key, value in self.settings.items()) and is_commit(revision())
        self.rows: dict[str, dict[str, Any]] = saved["rows"] if same else {}

    def add(self, case: Case, figures: dict[str, Any]) -> None:
        """Take in more figures of a row, and say what it is now."""
        self.rows[case.key] = self.rows.get(case.key, {}) | figures
        print(markdown(self.rows[case.key]), flush=True)
        self.write()

    def fail(self, case: Case, error: Exception) -> None:
        """Note a case that could not be measured; the next run tries it again."""
        self.failed[case.key] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"{case.key}: FAILED\n{error}", flush=True)
        self.write()

    def write(self) -> None:
        """Both files, rows in the order of the cases."""
        rows = {case.key: self.rows[case.key] for case in cases() if case.key in self.rows}
        copied = {"copy_bytes_per_second": self.bandwidth, "failed": self.failed}
        write_rows(self.path, {**self.settings, **copied}, rows)
        lines = [*header(COLUMNS), *map(markdown, rows.values())]
        lines += [f"| **{key}: FAILED** | {words} |" for key, words in self.failed.items()]
        write_text(self.path.with_suffix(".md"), "\n".join([*lines, "", NOTES, "", *self.footer]))


def run_cases(out: Path, repeats: int) -> None:
    """Measure every case: ours and attention first, then slower peers, at last the names of our kernels.

    A case that fails has its error for a row, and ends the program with an error when all have had their turn.
    """
    table, per_line = Table(out, repeats), PerLine()
    print("\n".join([*table.footer, "", *header(COLUMNS)]), flush=True)
    for figure, find in {
        "ours": lambda case: measure(case, table.bandwidth, repeats),
        "per_line": lambda case: measure_peers(case, per_line, repeats),
        "kernels": kernel_names,  # slows what would be timed after it
    }.items():
        for case in cases():
            if case.key in table.failed or figure in table.rows.get(case.key, {}):
                continue
            try:
                table.add(case, find(case))
            except (ArithmeticError, RuntimeError) as error:  # what does not fit, too, is a RuntimeError
                table.fail(case, error)
            torch.cuda.empty_cache()
    if table.failed:
        raise SystemExit(f"{len(table.failed)} cases failed: {'; '.join(table.failed)}")
