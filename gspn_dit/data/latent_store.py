"""The latent store: what a VAE makes of a whole dataset, in memory-mapped shards.

A store is a folder of

    encode.json                what the encoding was started with; written first
    shard-00000.safetensors …  moments (n, 2C, h, w) float16, moments_flipped if asked for, labels (n,) int64, and
                               extra.NAME (n, …) for each further tensor that the manifest declares
    manifest.json              everything a reader needs, and each shard's size and checksum; written last

Moments are the mean and log-variance of the VAE's posterior, so that each epoch samples it anew. Shard k holds images
[k·shard_size, (k+1)·shard_size) of the dataset, less the unreadable ones, which its metadata names: any process can
write any shard, and a store is the same however many wrote it or how often it was interrupted. A finished store is only
ever added to by renames: a shard that is truncated while it is mapped kills its readers (SIGBUS).

Format 1 had no further tensors; it is read as it was.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from gspn_dit.data.extras import Extra, from_json
from gspn_dit.errors import InputError
from gspn_dit.progress import progress
from gspn_dit.storage.files import replacing, save_tensors, sha256, write_json

FORMAT_VERSION = 2
READABLE = (1, 2)


class LatentStore(Dataset):
    """A finished store, for reading: `store[i]` is the posterior's moments (2C, h, w) float32 and the label.

    Opening reads the manifest, and of each shard its size, its header and its labels. Latents are mapped into memory,
    never copied: however many processes read a store, its pages are in memory once. A shard is mapped when one of its
    images is first asked for; a pickled store maps its own.

    Args:
        folder: What `gspn-dit encode --out` wrote.

    Attributes:
        manifest: The manifest, as read.
        class_names: Name of each label.
        vae: Name or folder of the VAE that made it.
        scaling_factor: Latents are (sample - shift_factor)·scaling_factor, or (sample - latents_mean)·scaling_factor /
            latents_std.
        shift_factor: May be None, for 0.
        latents_mean: One number per channel, or None; so is latents_std.
        latents_std: See latents_mean.
        vae_sha256: SHA-256 of the weights of that VAE's `encoder` and `decoder`; None if the store does not say.
        image_size: Side of the encoded images in pixels.
        latent_channels: C.
        latent_size: (h, w).
        flipped: Whether the moments of the mirrored images are there too.
        extras: What the further tensors of each sample are like, by name.

    Raises:
        InputError: If the folder is no finished store, or a shard is missing, truncated, holds something else than the
            manifest says or a label that is no class, naming the shard.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.class_names: list[str] = self.manifest["class_names"]
        self.vae: str = self.manifest["vae"]
        self.scaling_factor: float = self.manifest["scaling_factor"]
        self.shift_factor: float | None = self.manifest["shift_factor"]
        self.latents_mean: list[float] | None = self.manifest.get("latents_mean")  # stores of before have none
        self.latents_std: list[float] | None = self.manifest.get("latents_std")
        self.vae_sha256: dict[str, str] | None = self.manifest.get("vae_sha256")
        self.image_size: int = self.manifest["image_size"]
        self.latent_channels: int = self.manifest["latent_channels"]
        self.latent_size: tuple[int, int] = tuple(self.manifest["latent_size"])
        self.flipped: bool = self.manifest["flipped"]
        self.extras: dict[str, Extra] = from_json(self.manifest.get("extras"))
        self._ends = list(accumulate(shard["count"] for shard in self.manifest["shards"]))
        self._shards: dict[int, dict[str, Tensor]] = {}
        for shard in self.manifest["shards"]:
            check_size(self.folder, shard)
            self._map(shard)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        shard, row = self._find(index)
        return shard["moments"][row].float(), int(shard["labels"][row])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.latent_channels, *self.latent_size

    @property
    def condition_names(self) -> tuple[str, ...]:
        """What a sample holds beside the latents."""
        return ("class_labels", *self.extras)

    def sample(self, index: int, flip: bool = False, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """`moments` (2C, h, w) float32, of the mirror image if asked, `class_labels` () long, and the extras.

        The extras are as they were stored, and the same for the mirror image. Only those of `names` are read; None is
        all of them.
        """
        shard, row = self._find(index)
        wanted = self.extras if names is None else [name for name in self.extras if name in names]
        extras = {name: shard[_key(name)][row].clone() for name in wanted}
        return {"moments": self.moments(index, flip), "class_labels": torch.tensor(self.label(index)), **extras}

    def moments(self, index: int, flip: bool = False) -> Tensor:
        """Mean and log-variance (2C, h, w), float32, of image `index`, or of its mirror image.

        Raises:
            InputError: If `flip` is asked of a store without mirrored moments.
        """
        if flip and not self.flipped:
            raise InputError(
                f"{self.folder} has no mirrored latents",
                argument="horizontal_flip",
                value=True,
                remedy="encode with --horizontal-flip true",
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
        moments = ("moments", "moments_flipped") if self.flipped else ("moments",)
        names = ("labels", *moments, *map(_key, self.extras))
        path = self.folder / entry["file"]
        try:
            with safe_open(path, "pt") as file:
                shard = {name: file.get_tensor(name) for name in names}  # views of the mapped file: nothing is read yet
        except (OSError, SafetensorError) as error:
            raise InputError(f"shard {path} is damaged ({error})", remedy=REMEDY) from error
        shape = (entry["count"], 2 * self.latent_channels, *self.latent_size)
        if any(shard[name].shape != shape for name in moments) or shard["labels"].shape != shape[:1]:
            raise InputError(f"shard {path} does not hold {shape} latents as the manifest says", remedy=REMEDY)
        for name, extra in self.extras.items():
            found = shard[_key(name)]
            if (found.dtype, found.shape) != (extra.dtype, (entry["count"], *extra.shape)):
                raise InputError(
                    f"shard {path} does not hold {name} of {extra.dtype} {extra.shape} as the manifest says",
                    remedy=REMEDY,
                )
        check_labels(path, shard["labels"], len(self.class_names))
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}


def _key(name: str) -> str:
    """What a shard calls the extra of a name."""
    return f"extra.{name}"


REMEDY = (
    "delete it and run the same encode command again, or make the same call of `encode`, which makes what is missing"
)


def origin_of(source: object, name: str) -> str:
    """The name or folder of the images of a source that was opened by that name: of a store, those that it is of."""
    return source.manifest.get("data", name) if isinstance(source, LatentStore) else name


def is_latent_store(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a finished latent store."""
    return (Path(folder) / "manifest.json").is_file()


def is_unfinished_store(folder: str | os.PathLike) -> bool:
    """Whether a latent store was begun in a folder and is not finished."""
    return (Path(folder) / "encode.json").is_file() and not is_latent_store(folder)


def how_to_encode(folder: str | os.PathLike) -> str:
    """What to run to make a latent store in a folder, or to finish the one begun there, for an error message."""
    verb, begun = ("finish", begun_with(Path(folder))) if is_unfinished_store(folder) else ("make", {})
    extras = begun.get("extras") or {}
    readers = {name: begun[name] for name in ("tokenizer", "text_encoder") if begun.get(name)}
    if extras and not readers:
        names = ", ".join(extras)
        return (
            "to finish the latent store there, run `gspn-dit encode-t2i` as before, or call "
            f"gspn_dit.data.encode.encode with what makes {names}"
        )
    data, vae, size = (begun.get(key, "…") for key in ("data", "vae", "image_size"))
    switches = " --horizontal-flip true" if begun.get("flipped") else ""
    switches += " --exif-orientation true" if begun.get("exif_orientation") else ""
    switches += "".join(f" --{name.replace('_', '-')} {place}" for name, place in readers.items())
    if readers:
        switches += f" --tokens {extras['input_ids']['shape'][0]}"
    return (
        f"to {verb} a latent store there, run "
        f"`gspn-dit encode --data {data} --vae {vae} --image-size {size}{switches} --out {folder}`"
    )


def begun_with(folder: Path) -> dict[str, Any]:
    """What encode.json holds; nothing if there is none. Raises :class:`InputError`."""
    path = folder / "encode.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error})", remedy="restore it, or encode anew in another folder"
        ) from error


def verify(folder: str | os.PathLike) -> int:
    """Compare every shard with its checksum and return how many images the store holds.

    Raises:
        InputError: Naming every missing or changed shard, or if the folder is no finished store.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    faults = [
        f"{folder / 'manifest.json'} has changed since it was written ({key} is not as in encode.json)"
        for key, value in begun_with(folder).items()
        if manifest.get(key) != value
    ]
    for shard in progress(manifest["shards"], desc="verify", unit="shard"):
        if (fault := size_fault(folder, shard)) is not None:
            faults.append(fault)
        elif sha256(folder / shard["file"]) != shard["sha256"]:
            faults.append(f"shard {folder / shard['file']} has changed since it was written")
    if faults:
        raise InputError("; ".join(faults), remedy=REMEDY)
    return manifest["num_images"]


def write_shard(
    path: Path,
    moments: Tensor,
    flipped: Tensor | None,
    labels: Tensor,
    skipped: list[str],
    tagged: int = 0,
    extras: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one shard, atomically.

    Args:
        path: Of the shard.
        moments: Of its images; see :class:`LatentStore`.
        flipped: Of their mirror images, or None.
        labels: Of its images.
        skipped: The files of its range that could not be read.
        tagged: How many of its images have an EXIF orientation other than upright.
        extras: Further tensors (n, …) of its images, by name; the settings given to :func:`write_manifest` declare
            them as :func:`gspn_dit.data.extras.to_json` says.
    """
    tensors = {"moments": moments, "labels": labels} | ({} if flipped is None else {"moments_flipped": flipped})
    tensors |= {_key(name): tensor for name, tensor in (extras or {}).items()}
    if tagged:  # no second entry of the metadata: safetensors writes those in any order, and shards are to be the same
        tensors["exif_tagged"] = torch.tensor([tagged])
    with replacing(path) as temporary:
        save_tensors(tensors, temporary, {"skipped": json.dumps(skipped)})


def write_manifest(
    folder: Path, settings: dict[str, Any], files: list[str], rewritten: Collection[str] | None = None
) -> dict[str, Any]:
    """Finish a store: describe its shards, which are all there, beside the settings. Returns the manifest.

    Every process of a launch calls this: they share the reading, and the main one writes.

    Args:
        folder: The store.
        settings: What encode.json holds.
        files: Names of all shards, in order.
        rewritten: Those made since the manifest that is there; the others keep its checksums, so that finishing a
            store anew never makes damage official. None describes all afresh.

    Raises:
        InputError: If no image could be read, or a shard is damaged.
    """
    from accelerate import PartialState  # reading a store needs none of accelerate
    from accelerate.utils import gather_object

    processes = PartialState()
    known = {} if rewritten is None else _known_checksums(folder, rewritten)
    mine = files[processes.process_index :: processes.num_processes]
    bar = progress(mine, desc="checksums", unit="shard", disable=not processes.is_main_process)
    count, extras = len(settings["class_names"]), from_json(settings.get("extras"))
    described = dict(
        gather_object([(name, describe_shard(folder / name, count, extras, known.get(name))) for name in bar])
    )
    shards = [described[name] for name in files]
    skipped = [path for shard in shards for path in shard["skipped"]]
    filled = [shard for shard in shards if shard["count"]]
    if not filled:
        raise InputError(
            f"none of its {len(skipped)} images can be read, among them {skipped[0]}",
            argument="data",
            value=settings["data"],
            remedy=f"mend them, delete {folder} and encode again",
        )
    channels, *latent_size = filled[0]["shape"]
    manifest = {
        "format": FORMAT_VERSION,
        **settings,
        "latent_channels": channels // 2,
        "latent_size": latent_size,
        "num_images": sum(shard["count"] for shard in filled),
        "class_counts": [sum(counts) for counts in zip(*(shard["class_counts"] for shard in filled), strict=True)],
        "skipped": skipped,
        "exif_tagged": sum(shard["exif_tagged"] for shard in filled),
        "shards": [{key: shard[key] for key in ("file", "count", "bytes", "sha256")} for shard in filled],
    }
    if processes.is_main_process:
        write_json(folder / "manifest.json", manifest)
    return manifest


def _known_checksums(folder: Path, rewritten: Collection[str]) -> dict[str, str]:
    try:
        shards = read_manifest(folder)["shards"]
    except InputError:  # none yet, or a damaged one, which is about to be replaced
        return {}
    return {shard["file"]: shard["sha256"] for shard in shards if shard["file"] not in rewritten}


def describe_shard(
    path: Path, num_classes: int, extras: Mapping[str, Extra], known_sha256: str | None = None
) -> dict[str, Any]:
    """What the manifest needs to know of a shard, whose checksum is computed unless it is given.

    Raises :class:`InputError` if the shard is damaged, or does not hold the extras that are declared.
    """
    try:
        with safe_open(path, "pt") as file:
            count, *shape = file.get_slice("moments").get_shape()
            labels = file.get_tensor("labels")
            skipped = json.loads(file.metadata()["skipped"])
            tagged = int(file.get_tensor("exif_tagged")) if "exif_tagged" in file.keys() else 0  # noqa: SIM118
            found = {name: file.get_slice(_key(name)).get_shape() for name in extras}
    except (OSError, SafetensorError) as error:
        raise InputError(f"shard {path} is damaged ({error})", remedy=REMEDY) from error
    for name, extra in extras.items():
        if found[name] != [count, *extra.shape]:
            raise InputError(
                f"shard {path} holds {name} of shape {found[name]}, not {[count, *extra.shape]}", remedy=REMEDY
            )
    check_labels(path, labels, num_classes)
    return {
        "file": path.name,
        "count": count,
        "bytes": path.stat().st_size,
        "sha256": known_sha256 or sha256(path),
        "shape": shape,
        "class_counts": labels.bincount(minlength=num_classes).tolist(),
        "skipped": skipped,
        "exif_tagged": tagged,
    }


def some_moments(folder: Path, files: list[str], most: int) -> Iterator[Tensor]:
    """Moments (n, 2C, h, w) float32 of about that many images of a store at most, spread over its shards, by shard.

    Raises :class:`InputError` if a shard is damaged.
    """
    each = max(1, most // len(files))
    for name in files[:: max(1, len(files) // most)]:
        try:
            with safe_open(folder / name, "pt") as file:
                moments = file.get_tensor("moments")
        except (OSError, SafetensorError) as error:
            raise InputError(f"shard {folder / name} is damaged ({error})", remedy=REMEDY) from error
        if len(moments):
            yield moments[torch.linspace(0, len(moments) - 1, min(each, len(moments))).round().long()].float()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store. Raises :class:`InputError`."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            "no finished latent store there (no manifest.json)",
            argument="source",
            value=str(folder),
            remedy=how_to_encode(folder),
        ) from None
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error})", remedy="run the same encode command again to rewrite it"
        ) from error
    if manifest.get("format") not in READABLE:
        formats = " and ".join(map(str, READABLE))
        raise InputError(
            f"{path} has format {manifest.get('format')!r}, this version reads {formats}", remedy="encode anew"
        )
    return manifest


def check_size(folder: Path, shard: dict[str, Any]) -> None:
    """Raise :class:`InputError` if a shard of the manifest is missing or has another size."""
    if (fault := size_fault(folder, shard)) is not None:
        raise InputError(fault, remedy=REMEDY)


def size_fault(folder: Path, shard: dict[str, Any]) -> str | None:
    """What is wrong with a shard's file: that it is missing, or its size; None if nothing is."""
    path = folder / shard["file"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"shard {path} is missing"
    return None if size == shard["bytes"] else f"shard {path} has {size} bytes instead of {shard['bytes']}"


def check_labels(path: Path, labels: Tensor, num_classes: int) -> None:
    """Raise :class:`InputError` if a label of a shard is no class, naming the first."""
    if len(wrong := ((labels < 0) | (labels >= num_classes)).nonzero()):
        first = int(wrong[0])
        raise InputError(
            f"shard {path} holds labels outside 0 … {num_classes - 1} "
            f"({len(wrong)} of {len(labels)}, first {int(labels[first])} at its image {first})",
            remedy=REMEDY,
        )
