"""Damaged data, as docs/reliability.md lists it: who notices, what they say, and that the remedy they name works."""

import json
import os
import signal
import warnings

import numpy as np
import pytest
from made.faults import finished, start
from made.runs import checkpoint_step, list_checkpoints
from made.store import make_store
from made.training import config, options, wait_for
from PIL import Image
from safetensors.torch import load_file

from gspn_dit.commands import EncodeOptions as Options
from gspn_dit.config import Config
from gspn_dit.data import LatentStore
from gspn_dit.data.encode import main as encode
from gspn_dit.data.latent_store import verify, write_shard
from gspn_dit.errors import InputError
from gspn_dit.training.loop import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SHARD = "shard-00001.safetensors"


def make(store):
    """The held-out digits in three shards; also the remedy for damage to one."""
    encode(Options("digits", "digits", 32, str(store), split="test", shard_size=200, num_workers=0, device="cpu"))
    return store


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture
def store(intact, tmp_path):
    """A copy to damage."""
    folder = tmp_path / "store"
    folder.mkdir()
    for path in intact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def training(source, run, workers=0):
    """Two steps of a tiny model."""
    given = {
        "output_dir": run,
        "model.name": "gspn-dit-ti-1",
        "data.source": source,
        "data.vae": "digits",
        "model.overrides": "{width: 32, depth: 2, num_groups: 2, global_layers: 1}",
        "data.image_size": 32,
        "data.horizontal_flip": "false",
        "data.num_workers": workers,
        "diffusion.objective": "flow",
        "training.max_steps": 2,
        "training.batch_size": 4,
        "training.sample_every": 0,
        "training.trackers": "[]",
    }
    empty = run.parent / "empty.yaml"
    empty.write_text("")
    return Config.load(empty, [str(part) for key, value in given.items() for part in (f"--{key}", value)])


def refused(store, tmp_path, words):
    """Opening the store, and starting to train on it, both say so before anything is written."""
    with pytest.raises(InputError, match=words):
        LatentStore(store)
    with pytest.raises(InputError, match=words):
        train(training(store, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def mend(store, intact):
    """The remedy that the messages give: delete the shard and encode again."""
    (store / SHARD).unlink(missing_ok=True)
    make(store)
    assert verify(store) == 500
    assert (store / SHARD).read_bytes() == (intact / SHARD).read_bytes()


def test_a_truncated_shard(store, intact, tmp_path):
    content = (store / SHARD).read_bytes()
    (store / SHARD).write_bytes(content[: len(content) // 2])
    refused(store, tmp_path, rf"{SHARD} has \d+ bytes instead of \d+; delete it and run the same encode command")
    with pytest.raises(InputError, match=SHARD):
        verify(store)
    mend(store, intact)


def test_a_missing_shard(store, intact, tmp_path):
    (store / SHARD).unlink()
    refused(store, tmp_path, rf"{SHARD} is missing; delete it and run the same encode command")
    with pytest.raises(InputError, match=f"{SHARD} is missing"):
        verify(store)
    mend(store, intact)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_a_bit_flipped_shard(store, intact, place):
    content = bytearray((store / SHARD).read_bytes())
    content[int(place * len(content))] ^= 16
    (store / SHARD).write_bytes(content)
    with pytest.raises(InputError, match=f"{SHARD} has changed since it was written") as error:
        verify(store)
    assert "shard-00000" not in str(error.value) and "shard-00002" not in str(error.value)
    mend(store, intact)


def test_a_shard_truncated_under_a_running_training(tmp_path):
    """SIGBUS, which Python cannot catch: the process is gone, its checkpoints are not, and the restart says why."""
    store, run, log = make_store(tmp_path / "store", images=400), tmp_path / "run", tmp_path / "log"
    shard = store / "shard-00000.safetensors"
    content = shard.read_bytes()
    given = ["--training.max_steps", "100000", "--resume", "auto"]
    process = start(options(run, store, *given), log)
    try:
        wait_for(run, lines=5)
        os.truncate(shard, 4096)
        assert finished(process) == -signal.SIGBUS
    finally:
        process.kill()
    step = checkpoint_step(list_checkpoints(run)[-1])
    with pytest.raises(InputError, match=r"shard-00000\.safetensors has 4096 bytes instead of \d+; delete it and run"):
        train(config(run, store, *given))
    shard.write_bytes(content)
    train(config(run, store, *given, "--training.max_steps", step + 2))
    assert checkpoint_step(list_checkpoints(run)[-1]) == step + 2


@pytest.mark.parametrize("label", [10, -1])
def test_a_class_id_out_of_range(store, intact, tmp_path, label):
    tensors = load_file(store / SHARD)
    tensors["labels"][17] = label
    write_shard(store / SHARD, tensors["moments"], None, tensors["labels"], [])
    refused(store, tmp_path, rf"{SHARD} holds labels outside 0 … 9 \(1 of 200, first {label} at its image 17\)")
    with pytest.raises(InputError, match=f"{SHARD} has changed"):
        verify(store)
    mend(store, intact)


@pytest.fixture
def torn_folder(tmp_path):
    """Six images of two classes, one of them cut in the middle."""
    draw = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.png", "cat/3.png", "dog/4.png", "dog/5.png", "dog/6.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    torn = tmp_path / "images" / "cat" / "2.png"
    torn.write_bytes(torn.read_bytes()[:2000])
    return tmp_path / "images"


@pytest.mark.usefixtures("as_a_command_says_it")
def test_an_unreadable_image_when_encoding(torn_folder, tmp_path, capsys):
    encode(Options(str(torn_folder), "digits", 32, str(tmp_path / "store"), num_workers=0, device="cpu"))
    printed = capsys.readouterr()
    assert "cat/2.png" in printed.out + printed.err
    assert "5 images in 1 shards, 1 unreadable files left out" in printed.out
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["skipped"] == [str(torn_folder / "cat" / "2.png")]
    assert manifest["class_counts"] == [2, 3]
    assert [label for _, label in LatentStore(tmp_path / "store")] == [0, 0, 1, 1, 1]


def test_an_unreadable_image_when_training_on_the_folder(torn_folder, tmp_path):
    with pytest.warns(UserWarning, match=r"unreadable image 1, skipped: .*cat/2\.png"):
        train(training(torn_folder, tmp_path / "run"))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-0000002"]  # it went on to its end


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_unreadable_images_is_one_line_whoever_reads_it(torn_folder, tmp_path, workers):
    for path in torn_folder.rglob("*.png"):
        path.write_bytes(b"no image")
    message = rf"^none of the 6 images can be read, among them {torn_folder}/cat/1\.png; restore them$"
    with pytest.raises(InputError, match=message), warnings.catch_warnings(action="ignore"):
        train(training(torn_folder, tmp_path / "run", workers))
