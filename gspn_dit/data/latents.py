"""The latent store: what a VAE makes of a whole dataset, in memory-mapped shards.

A store is a folder of

    encode.json                what the encoding was started with; written first
    shard-00000.safetensors …  moments (n, 2C, h, w) float16, moments_flipped if asked for, labels (n,) int64
    manifest.json              everything a reader needs, and each shard's size and checksum; written last

Moments are the mean and log-variance of the VAE's posterior, so that each epoch samples it anew. Shard k holds images
[k·shard_size, (k+1)·shard_size) of the dataset, less the unreadable ones, which its metadata names: any process can
write any shard, and a store is the same however many wrote it or how often it was interrupted.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from gspn_dit.errors import InputError
from gspn_dit.files import replacing

FORMAT_VERSION = 1


class LatentStore(Dataset):
    """A finished store, for reading: `store[i]` is the posterior's moments (2C, h, w) float32 and the label.

    Opening reads the manifest and the shards' sizes only. A shard is mapped into memory when one of its images is first
    asked for; a pickled or forked store maps its own.

    Args:
        folder: What `python -m gspn_dit.data.encode --out` wrote.

    Attributes:
        manifest: The manifest, as read.
        class_names: Name of each label.
        vae: Name or folder of the VAE that made it.
        scaling_factor: Latents are (sample - shift_factor)·scaling_factor.
        shift_factor: May be None, for 0.
        image_size: Side of the encoded images in pixels.
        latent_channels: C.
        latent_size: (h, w).
        flipped: Whether the moments of the mirrored images are there too.

    Raises:
        InputError: If the folder is no finished store, or a shard is missing or of the wrong size; reading raises it if
            a shard does not hold what the manifest says.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.class_names: list[str] = self.manifest["class_names"]
        self.vae: str = self.manifest["vae"]
        self.scaling_factor: float = self.manifest["scaling_factor"]
        self.shift_factor: float | None = self.manifest["shift_factor"]
        self.image_size: int = self.manifest["image_size"]
        self.latent_channels: int = self.manifest["latent_channels"]
        self.latent_size: tuple[int, int] = tuple(self.manifest["latent_size"])
        self.flipped: bool = self.manifest["flipped"]
        self._ends = list(accumulate(shard["count"] for shard in self.manifest["shards"]))
        self._shards: dict[int, dict[str, Tensor]] = {}
        for shard in self.manifest["shards"]:
            check_size(self.folder, shard)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.moments(index), self.label(index)

    def moments(self, index: int, flip: bool = False) -> Tensor:
        """Mean and log-variance (2C, h, w), float32, of image `index`, or of its mirror image.

        Raises:
            InputError: If `flip` is asked of a store without mirrored moments.
        """
        if flip and not self.flipped:
            raise InputError(
                f"horizontal_flip=True: {self.folder} has no mirrored latents; encode with --horizontal-flip true"
            )
        shard, row = self._find(index)
        return shard["moments_flipped" if flip else "moments"][row].float()

    def label(self, index: int) -> int:
        """The label of image `index`."""
        shard, row = self._find(index)
        return int(shard["labels"][row])

    def _find(self, index: int) -> tuple[dict[str, Tensor], int]:
        """The tensors of the shard that holds an image, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a store of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        if number not in self._shards:
            self._shards[number] = self._map(self.manifest["shards"][number])
        return self._shards[number], index - (self._ends[number] - self.manifest["shards"][number]["count"])

    def _map(self, entry: dict[str, Any]) -> dict[str, Tensor]:
        names = ("labels", "moments", "moments_flipped") if self.flipped else ("labels", "moments")
        path = self.folder / entry["file"]
        try:
            with safe_open(path, "pt") as file:
                shard = {name: file.get_tensor(name) for name in names}  # views of the mapped file: nothing is read yet
        except (OSError, SafetensorError) as error:
            raise InputError(f"shard {path} is damaged ({error}): {REMEDY}") from error
        shape = (entry["count"], 2 * self.latent_channels, *self.latent_size)
        if any(shard[name].shape != shape for name in names[1:]) or shard["labels"].shape != shape[:1]:
            raise InputError(f"shard {path} does not hold {shape} latents as the manifest says: {REMEDY}")
        if not 0 <= int(shard["labels"].min()) <= int(shard["labels"].max()) < len(self.class_names):
            raise InputError(f"shard {path} holds labels outside 0 … {len(self.class_names) - 1}: {REMEDY}")
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}


REMEDY = "delete it and run the same encode command again, which makes the shards that are missing"


def is_latent_store(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a finished latent store."""
    return (Path(folder) / "manifest.json").is_file()


def is_unfinished_store(folder: str | os.PathLike) -> bool:
    """Whether a latent store was begun in a folder and is not finished."""
    return (Path(folder) / "encode.json").is_file() and not is_latent_store(folder)


def how_to_encode(folder: str | os.PathLike) -> str:
    """What to run to make a latent store in a folder, or to finish the one begun there, for an error message."""
    verb, begun = "make", {}
    if is_unfinished_store(folder):
        verb, begun = "finish", json.loads((Path(folder) / "encode.json").read_text())
    data, vae, size = (begun.get(key, "…") for key in ("data", "vae", "image_size"))
    flip = " --horizontal-flip true" if begun.get("flipped") else ""
    return (
        f"to {verb} a latent store there, run "
        f"`python -m gspn_dit.data.encode --data {data} --vae {vae} --image-size {size}{flip} --out {folder}`"
    )


def verify(folder: str | os.PathLike) -> int:
    """Compare every shard with its checksum and return how many images the store holds.

    Raises:
        InputError: Naming every missing or changed shard, or if the folder is no finished store.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    faults = []
    for shard in tqdm(manifest["shards"], desc="verify", unit="shard"):
        try:
            check_size(folder, shard)
        except InputError as error:
            faults.append(str(error).partition(":")[0])
            continue
        if checksum(folder / shard["file"]) != shard["sha256"]:
            faults.append(f"shard {folder / shard['file']} has changed since it was written")
    if faults:
        raise InputError(f"{'; '.join(faults)}: {REMEDY}")
    return manifest["num_images"]


def write_shard(path: Path, moments: Tensor, flipped: Tensor | None, labels: Tensor, skipped: list[str]) -> None:
    """Write one shard, atomically; `skipped` names the files of its range that could not be read."""
    tensors = {"moments": moments, "labels": labels} | ({} if flipped is None else {"moments_flipped": flipped})
    with replacing(path) as temporary:
        # safetensors' own save_file makes files that no other user may read
        temporary.write_bytes(save(tensors, metadata={"skipped": json.dumps(skipped)}))


def write_manifest(folder: Path, settings: dict[str, Any], files: list[str]) -> dict[str, Any]:
    """Finish a store: describe its shards, which are all there, beside the settings. Returns the manifest.

    Raises:
        InputError: If no image could be read, or a shard is damaged.
    """
    shards, skipped = [], []
    for name in tqdm(files, desc="checksums", unit="shard"):
        path = folder / name
        try:
            with safe_open(path, "pt") as file:
                count, *shape = file.get_slice("moments").get_shape()
                skipped += json.loads(file.metadata()["skipped"])
        except (OSError, SafetensorError) as error:
            raise InputError(f"shard {path} is damaged ({error}): {REMEDY}") from error
        if count:
            shards.append({"file": name, "count": count, "bytes": path.stat().st_size, "sha256": checksum(path)})
    if not shards:
        raise InputError(
            f"data={settings['data']!r}: none of its {len(skipped)} images can be read, among them {skipped[0]}; "
            f"mend them, delete {folder} and encode again"
        )
    manifest = {
        "format": FORMAT_VERSION,
        **settings,
        "latent_channels": shape[0] // 2,
        "latent_size": shape[1:],
        "num_images": sum(shard["count"] for shard in shards),
        "skipped": skipped,
        "shards": shards,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store. Raises :class:`InputError`."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"source={str(folder)!r}: no finished latent store there (no manifest.json); {how_to_encode(folder)}"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): run the same encode command again to rewrite it") from error
    if manifest.get("format") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT_VERSION}: encode anew"
        )
    return manifest


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def check_size(folder: Path, shard: dict[str, Any]) -> None:
    """Raise :class:`InputError` if a shard of the manifest is missing or has another size."""
    path = folder / shard["file"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"shard {path} is missing: {REMEDY}") from None
    if size != shard["bytes"]:
        raise InputError(f"shard {path} has {size} bytes instead of {shard['bytes']}: {REMEDY}")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
