"""The CUDA rows of benchmarks/operator.py: ours against the byte floor and its peers, all in one run on one device."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gspn_dit.files import write_json
from gspn_dit.ops import propagate
from gspn_dit.ops.build import architectures, cuda_home

FOUR = ("down", "up", "right", "left")
HEAD = 64  # channels a head of the attention on the same tokens
LONGEST_ATTENTION = 128 * 128  # tokens; beyond it a call takes seconds
LONGEST_REFERENCE = 128  # lines; beyond it the reference's lists of lines take more memory than there is


@dataclass(frozen=True)
class Case:
    """One row: a shape, its gates and scans.

    `predicted` is the fraction of the copy bandwidth expected before anything was measured; docs/kernels.md says why.
    """

    name: str
    batch: int
    side: int
    channels: int
    groups: int
    chunk: int | None
    predicted: float
    directions: tuple[str, ...] = FOUR
    dtype: torch.dtype = torch.bfloat16
    sites_innermost: bool = False
    factors: bool = True  # f and s a channel and direction, as in gspn-dit
    trains: bool = True

    @property
    def floor_bytes(self) -> int:
        """x, gates and λ read once, y written once."""
        sites = self.batch * self.side**2
        return self.dtype.itemsize * sites * (2 * self.channels + 4 * len(self.directions) * self.groups)

    def operands(self) -> list[Tensor]:
        """Random x, gates and λ in the layout that suits the kernel, then f and s or None and None."""
        b, n, c, g, k = self.batch, self.side, self.channels, self.groups, len(self.directions)
        if self.sites_innermost:  # every axis outside the sites
            shapes = (b, c, n, n), (b, k, 3, g, n, n), (b, k, g, n, n)
            orders = (0, 2, 3, 1), (0, 4, 5, 1, 2, 3), (0, 3, 4, 1, 2)
        elif g < c:  # a group's gates side by side
            shapes = (b, n, n, c), (b, n, n, g, k, 3), (b, n, n, g, k)
            orders = (0, 1, 2, 3), (0, 1, 2, 4, 5, 3), (0, 1, 2, 4, 3)
        else:
            shapes = (b, n, n, c), (b, n, n, k, 3, g), (b, n, n, k, g)
            orders = (0, 1, 2, 3), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4)
        make = torch.randn, torch.randn, torch.rand
        tensors = [
            f(shape, dtype=self.dtype, device="cuda").permute(order)
            for f, shape, order in zip(make, shapes, orders, strict=True)
        ]
        factors = [torch.rand(k, c, device="cuda"), torch.randn(k, c, device="cuda")] if self.factors else [None, None]
        return tensors + factors

    def run(
        self, x: Tensor, gates: Tensor, lam: Tensor, decay: Tensor | None, scale: Tensor | None, backend: str
    ) -> Tensor:
        """The operator on a set of operands."""
        return propagate(x, gates, lam, decay=decay, scale=scale, chunk=self.chunk, directions=self.directions,
                         backend=backend)  # fmt: skip


def cases() -> Iterator[Case]:
    """GSPN-2's configuration, then DiT-XL's maps from 256 pixels to 16K, and the gates of the `gspn` family."""
    yield Case("GSPN-2: 1024², 8 ch", 16, 1024, 8, 8, None, 0.75, ("down",), torch.float32, sites_innermost=True,
               factors=False)  # fmt: skip
    for pixels, batch, predicted in ((256, 64, 0.5), (512, 32, 0.25), (1024, 8, 0.25), (2048, 2, 0.25)):
        for chunk in (2, None):
            yield Case(f"{pixels} px", batch, pixels // 16, 1152, 18, chunk, predicted)
    yield Case("256 px, without f and s", 64, 16, 1152, 18, None, 0.6, factors=False)
    yield Case("256 px, 16 channels a group", 64, 16, 1152, 72, None, 0.45)
    yield Case("256 px, a gate a channel", 64, 16, 1152, 1152, 2, 0.6, factors=False)
    for chunk in (16, None):
        yield Case("16K px", 1, 1024, 1152, 18, chunk, 0.12, trains=False)


def median_ms(run: Callable[[int], object], repeats: int) -> float:
    """Median device time of a call, milliseconds; `run` is given the number of the call, for fresh inputs."""
    run(0)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, end) in enumerate(events):
        start.record()
        run(i + 1)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second of a large device-to-device copy, counting those read and those written."""
    source = torch.randn(1 << 29, device="cuda")  # 2 GB
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * median_ms(lambda _: target.copy_(source), repeats))


def input_sets(case: Case) -> list[list[Tensor]]:
    """As many sets of operands as it takes to be larger than the cache together, in turns."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [case.operands()]
    while len(sets) < 8 and len(sets) * case.floor_bytes < 4 * cache:
        sets.append(case.operands())
    return sets


def time_ours(case: Case, backend: str, repeats: int) -> tuple[float, float | None]:
    """Milliseconds of the forward pass, and of forward and backward."""
    sets = input_sets(case)
    with torch.no_grad():
        forward = median_ms(lambda i: case.run(*sets[i % len(sets)], backend), repeats)
    if not case.trains:
        return forward, None
    grad = torch.randn_like(sets[0][0])
    trained = [[tensor.requires_grad_() for tensor in tensors if tensor is not None] for tensors in sets]

    def step(i: int) -> object:
        i %= len(sets)
        return torch.autograd.grad(case.run(*sets[i], backend), trained[i], grad)

    return forward, median_ms(step, repeats)


def time_attention(case: Case, repeats: int) -> tuple[float, float] | None:
    """Flash attention in bf16 on the same tokens, in heads of 64 channels; None where it would take too long."""
    tokens = case.side**2
    if tokens > LONGEST_ATTENTION or case.channels % HEAD:
        return None
    shape = case.batch, case.channels // HEAD, tokens, HEAD
    qkv = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.no_grad():
            forward = median_ms(lambda _: F.scaled_dot_product_attention(*qkv), repeats)
        both = median_ms(lambda _: torch.autograd.grad(F.scaled_dot_product_attention(*qkv), qkv, grad), repeats)
    return forward, both


class PerLine:
    """benchmarks/per_line.cu: one launch a line, as GSPN-1's published kernel."""

    def __init__(self) -> None:
        source = Path(__file__).with_name("per_line.cu")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "per_line.so"
            nvcc, arch = cuda_home() / "bin" / "nvcc", architectures()[0].replace(".", "").removesuffix("+PTX")
            flags = ["-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{arch}"]
            subprocess.run([nvcc, *flags, source, "-o", library], check=True)
            self.library = ctypes.CDLL(str(library))

    def time(self, case: Case, repeats: int) -> float | None:
        """Milliseconds of all directions' scans; the maps' turns, the normalisation, u, f and s are not counted."""
        shape = case.batch * case.channels, case.side, case.side
        if 6 * case.dtype.itemsize * torch.Size(shape).numel() > 60e9 or case.dtype == torch.float16:
            return None
        x, lam, *weights = (torch.rand(shape, dtype=case.dtype, device="cuda") for _ in range(5))
        weights = [w / 3 for w in weights]
        h = torch.empty_like(x)
        scan = getattr(self.library, f"scan_{str(case.dtype).removeprefix('torch.')}")

        def run(_: int) -> None:
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, *weights, lam, h)]
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for _direction in case.directions:
                error = scan(*pointers, ctypes.c_int64(shape[0]), case.side, case.side, stream)
                assert error == 0, f"CUDA error {error}"

        return median_ms(run, max(3, repeats // 5))


def measure(case: Case, bandwidth: float, per_line: PerLine, repeats: int) -> dict:
    """One row's figures; a peer that can't run at this size is None."""
    floor_ms = 1e3 * case.floor_bytes / bandwidth
    row = {"case": case.name, "batch": case.batch, "side": case.side, "channels": case.channels, "groups": case.groups,
           "chunk": case.chunk, "directions": len(case.directions), "dtype": str(case.dtype).removeprefix("torch."),
           "floor_bytes": case.floor_bytes, "floor_ms": floor_ms, "predicted_fraction": case.predicted}  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    row["forward_ms"], row["both_ms"] = time_ours(case, "cuda", repeats)
    row["peak_bytes"] = torch.cuda.max_memory_allocated()
    row["fraction"] = floor_ms / row["forward_ms"]
    row["both_over_forward"] = row["both_ms"] and row["both_ms"] / row["forward_ms"]
    torch.cuda.empty_cache()
    attention = time_attention(case, repeats)
    row["attention_ms"], row["attention_both_ms"] = attention or (None, None)
    row["per_line_ms"] = per_line.time(case, repeats)
    few = max(3, repeats // 10)
    row["reference_ms"] = time_ours(case, "reference", few)[0] if case.side <= LONGEST_REFERENCE else None
    torch.cuda.empty_cache()
    return row


HEADER = [
    "| case | B, side, C, G | chunk | forward ms | floor ms | fraction (predicted) | × flash | × per line "
    "| × reference | fwd+bwd ms | over forward | × flash fwd+bwd | peak GB |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def markdown(row: dict) -> str:
    """A row of the table."""

    def ratio(peer: str, ours: str = "forward_ms") -> str:
        return "–" if row[peer] is None or row[ours] is None else f"{row[peer] / row[ours]:.1f}"

    def number(key: str, form: str) -> str:
        return "–" if row[key] is None else format(row[key], form)

    cells = [
        f"{row['case']} ({row['dtype']}, {row['directions']} directions)",
        f"{row['batch']}, {row['side']}, {row['channels']}, {row['groups']}",
        row["chunk"] or "global",
        number("forward_ms", ".3f"),
        number("floor_ms", ".3f"),
        f"{row['fraction']:.0%} ({row['predicted_fraction']:.0%})",
        ratio("attention_ms"),
        ratio("per_line_ms"),
        ratio("reference_ms"),
        number("both_ms", ".3f"),
        number("both_over_forward", ".1f"),
        ratio("attention_both_ms", "both_ms"),
        f"{row['peak_bytes'] / 1e9:.1f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def run_cases(out: Path, repeats: int) -> None:
    """Measure every case; OUT/<device>.json and .md are written anew after each, so a run cut short leaves its rows."""
    device = torch.cuda.get_device_name(0)
    bandwidth = copy_bandwidth(repeats)
    per_line = PerLine()
    report = {
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_bytes_per_second": bandwidth,
    }
    footer = (
        f"{device}, torch {torch.__version__}; device-to-device copy {bandwidth / 1e12:.2f} TB/s, read and written."
    )
    print(footer)
    rows: list[dict] = []
    lines = list(HEADER)
    name = device.lower().replace(" ", "-")
    print("\n".join(HEADER))
    for case in cases():
        try:
            rows.append(measure(case, bandwidth, per_line, repeats))
            lines.append(markdown(rows[-1]))
        except torch.OutOfMemoryError as error:
            lines.append(f"| {case.name} | out of memory: {str(error).splitlines()[0]} |")
        print(lines[-1], flush=True)
        torch.cuda.empty_cache()
        write_json(out / f"{name}.json", report | {"rows": rows})
        (out / f"{name}.md").write_text("\n".join([*lines, "", footer, ""]))
