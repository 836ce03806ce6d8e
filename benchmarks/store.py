"""The latent store at ImageNet's size: opening it, many readers, and its speed against one .npy file an image.

`python -m benchmarks.store [--folder DIR] [--out FILE.md]` makes its data in a temporary folder (about 1.8 GB at the
defaults), measures in fresh processes, prints the tables, and removes the data.
"""

from __future__ import annotations

from benchmarks.commands import StoreOptions as Options
from benchmarks.commands import run

if __name__ == "__main__":  # before the imports that take seconds
    raise SystemExit(run("store"))

import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import processor
from benchmarks.memory import resident
from benchmarks.result_files import write_report
from benchmarks.tables import header, row
from gspn_dit.data.latent_store import LatentStore, write_manifest, write_shard
from gspn_dit.storage.files import write_json

CLASSES = 1000
SHARD_SIZE = 4096
BATCH_SIZE = 256


class Npys(Dataset):
    """What the store is compared with: one .npy file of moments an image, the labels in one array."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.labels = np.load(folder / "labels.npy")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.load(self.folder / f"{index}.npy")).float(), int(self.labels[index])


def make_store(folder: Path, images: int, side: int, npys: Path | None = None) -> None:
    """A store of made moments (8, side, side), and the same contents as single files."""
    settings = {
        "data": "made",
        "split": "train",
        "class_names": [f"class {i}" for i in range(CLASSES)],
        "image_size": 8 * side,
        "source_images": images,
        "flipped": False,
        "vae": "made",
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "shard_size": SHARD_SIZE,
    }
    folder.mkdir()
    write_json(folder / "encode.json", settings)
    names, labels = [], torch.arange(images) % CLASSES
    for start in range(0, images, SHARD_SIZE):
        moments = torch.randn(min(SHARD_SIZE, images - start), 8, side, side).half()
        names.append(f"shard-{len(names):05d}.safetensors")
        write_shard(folder / names[-1], moments, None, labels[start : start + len(moments)], [])
        for i, one in enumerate(moments if npys else ()):
            np.save(npys / f"{start + i}.npy", one.numpy())
    if npys:
        np.save(npys / "labels.npy", labels.numpy())
    write_manifest(folder, settings, names)


def measure_opening(folder: Path) -> dict[str, float]:
    """Seconds and memory that opening takes a process that has imported everything."""
    before, start = resident("VmRSS"), time.perf_counter()
    store = LatentStore(folder)
    seconds, after = time.perf_counter() - start, resident("VmRSS")
    return {"images": len(store), "seconds": seconds, "growth": after - before, "resident": after}


def measure_readers(folder: Path, workers: int) -> list[float]:
    """Growth in private memory (bytes) of each worker that reads the store's images at random, all of them in sum."""
    shares = Shares(LatentStore(folder), workers)
    loader = DataLoader(shares, batch_size=1, num_workers=workers, multiprocessing_context="fork")
    return [float(grown) for grown in loader]


class Shares(Dataset):
    """Item k reads the k-th share of a store's images, in random order, and is the private memory (bytes) that took."""

    def __init__(self, store: LatentStore, count: int) -> None:
        self.store, self.count = store, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, share: int) -> float:
        order = np.random.default_rng(0).permutation(len(self.store))[share :: self.count].tolist()
        before = resident("RssAnon")
        for index in order:
            self.store[index]
        return resident("RssAnon") - before


def measure_speed(kind: str, folder: Path, workers: int, repeats: int) -> dict[str, float]:
    """Images a second read in random order through a DataLoader: cold, and the median of warm passes."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    dataset = LatentStore(folder) if kind == "store" else Npys(folder)

    loader = DataLoader(
        dataset,
        BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )

    def one_pass() -> float:
        start = time.perf_counter()
        total = sum(len(labels) for _, labels in loader)
        return total / (time.perf_counter() - start)

    return {"cold": one_pass(), "warm": statistics.median(one_pass() for _ in range(repeats))}


def fresh(measure: Callable, *arguments: object) -> Any:
    """What a function returns in a new process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def machine() -> str:
    """What these figures belong to."""
    return f"{processor()}, {os.cpu_count()} cores, Linux {platform.release()}, torch {torch.__version__}"


def opening_rows(folder: Path, workers: int) -> list[str]:
    """The table of opening a large store and of its readers."""
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    opened = fresh(measure_opening, folder)
    before = opened["resident"] - opened["growth"]
    grown = fresh(measure_readers, folder, workers)
    every_image = f"private memory that a worker adds, {workers} of them reading every image once, at random"
    return [
        f"A store of {opened['images']:,} latents of 4×4, {len(list(folder.glob('shard-*')))} shards, {size:.0f} MB:",
        "",
        *header(["", ""]),
        row(["opening, its files in the page cache", f"{opened['seconds']:.2f} s"]),
        row(["resident memory before it, of importing torch and diffusers", f"{before / 1e6:.0f} MB"]),
        row(["resident memory that opening adds", f"{opened['growth'] / 1e6:.0f} MB"]),
        row([every_image, f"at most {max(grown) / 1e6:.1f} MB"]),
    ]


def speed_rows(store: Path, npys: Path, options: Options) -> list[str]:
    """The table of samples a second."""
    rows = [
        f"{options.compared_images:,} latents of 32×32 (16 kB each), in random order, batches of {BATCH_SIZE}, "
        f"warm: median of {options.repeats} passes, all in the page cache; cold: one pass, its files dropped from it:",
        "",
        *header(
            ["reading processes", "cache", "store, samples/s", "one .npy per image, samples/s", "store is faster by"]
        ),
    ]
    for workers in (0, options.workers):
        ours, theirs = (
            fresh(measure_speed, kind, folder, workers, options.repeats)
            for kind, folder in (("store", store), ("npy", npys))
        )
        who = workers or "the training process itself"
        for cache in ("warm", "cold"):
            speeds = f"{ours[cache]:,.0f}", f"{theirs[cache]:,.0f}", f"{ours[cache] / theirs[cache]:.1f}×"
            rows.append(row([who, cache, *speeds]))
    return rows


def main(options: Options) -> None:
    """Measure opening a store of ImageNet's size, its many readers, and its speed against one .npy file an image."""
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="store-benchmark-") as temporary:
        large, store, npys = (Path(temporary) / name for name in ("large", "store", "npys"))
        npys.mkdir()
        make_store(large, options.images, 4)
        make_store(store, options.compared_images, 32, npys)
        lines = [*opening_rows(large, options.workers), "", *speed_rows(store, npys, options)]
    asked = f"`python -m benchmarks.store --workers {options.workers}`."
    write_report([*lines, "", asked], machine(), options.out)
