"""The training stream, the learning rate and the average, against what they are defined to be."""

import math
import pickle

import pytest
import torch
from made.store import make_store
from torch.utils.data import DataLoader

from gspn_dit.config import DataConfig, TrainingConfig
from gspn_dit.data import LatentStore, open_images
from gspn_dit.errors import InputError
from gspn_dit.training.ema import EMA, exponential
from gspn_dit.training.loop import learning_rate_at
from gspn_dit.training.positions import StepSampler
from gspn_dit.training.stream import TrainingStream, open_source


def stream_of(folder, **changes):
    arguments = dict(
        latent_shape=(4, 4, 4), condition_names=("class_labels",), dropout=0.25, horizontal_flip=False, seed=5
    )
    return TrainingStream(LatentStore(folder), **{**arguments, **changes})


def same(a, b):
    """Whether two samples or batches hold the same tensors."""
    return a.keys() == b.keys() and all(
        same(a[key], b[key]) if isinstance(a[key], dict) else torch.equal(a[key], b[key]) for key in a
    )


def label(sample):
    return int(sample["condition"]["class_labels"])


def test_an_item_is_a_function_of_seed_and_position(tmp_path):
    folder = make_store(tmp_path / "store")
    stream = stream_of(folder)
    first = [stream[n] for n in (0, 7, 30)]
    again = pickle.loads(pickle.dumps(stream_of(folder)))
    for n, sample in reversed(list(zip((0, 7, 30), first, strict=True))):  # another order, another process's copy
        assert same(sample, again[n])
    other = stream_of(folder, seed=6)[7]
    assert not torch.equal(other["noise"], first[1]["noise"])
    assert not torch.equal(first[0]["noise"], first[0]["posterior_noise"])


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order(tmp_path):
    stream = stream_of(make_store(tmp_path / "store"))
    shown = [int(stream[n]["moments"][0, 0, 0]) for n in range(48)]
    assert sorted(shown[:24]) == sorted(shown[24:]) == list(range(24))
    assert shown[:24] != shown[24:]


def test_draws_have_their_distributions(tmp_path):
    stream = stream_of(make_store(tmp_path / "store", flipped=True), horizontal_flip=True)
    samples = [stream[n] for n in range(2000)]
    noise = torch.stack([s["noise"] for s in samples])
    u = torch.stack([s["u"] for s in samples])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.03
    dropped = sum(bool(s["drop"]) for s in samples) / len(samples)
    mirrored = sum(float(s["moments"][0, 0, 0]) < 0 for s in samples) / len(samples)
    assert abs(dropped - 0.25) < 0.04  # four standard deviations
    assert abs(mirrored - 23 / 24 / 2) < 0.05  # image 0 is its own mirror
    assert all(label(s) == int(abs(s["moments"][0, 0, 0])) % 3 for s in samples)


def test_images_are_mirrored_with_their_label():
    digits = open_images("digits", 32)
    plain, mirrored = (
        TrainingStream(
            digits,
            latent_shape=(4, 8, 8),
            condition_names=("class_labels",),
            dropout=0,
            horizontal_flip=flip,
            seed=0,
        )
        for flip in (False, True)
    )
    pairs = [(plain[n], mirrored[n]) for n in range(40)]
    flips = [not torch.equal(a["image"], b["image"]) for a, b in pairs]
    assert 8 < sum(flips) < 32
    for (a, b), flip in zip(pairs, flips, strict=True):
        assert torch.equal(a["image"].flip(-1) if flip else a["image"], b["image"])
        assert label(a) == label(b)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_steps_hold_the_same_positions_however_they_are_split(processes, accumulation):
    parts = []
    for rank in range(processes):
        steps = StepSampler(3, 6, batch_size=16, accumulation=accumulation, rank=rank, processes=processes)
        assert len(steps) == 3 * accumulation
        parts.append(list(steps))
    for step in range(3, 6):
        micro = slice((step - 3) * accumulation, (step - 2) * accumulation)
        positions = [p for part in parts for batch in part[micro] for p in batch]
        assert sorted(positions) == list(range(16 * step, 16 * step + 16))


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(InputError, match=r"training\.batch_size=10.*multiple of 4"):
        StepSampler(0, 1, batch_size=10, accumulation=2, rank=0, processes=2)


def test_workers_change_nothing(tmp_path):
    stream = stream_of(make_store(tmp_path / "store"))
    sampler = StepSampler(0, 3, batch_size=6, accumulation=1, rank=0, processes=1)
    alone, with_workers = (list(DataLoader(stream, batch_sampler=sampler, num_workers=n)) for n in (0, 2))
    for a, b in zip(alone, with_workers, strict=True):
        assert same(a, b)
        assert a["condition"]["class_labels"].dtype == torch.long and a["drop"].dtype == torch.bool


def test_a_condition_that_the_data_does_not_hold_is_refused(tmp_path):
    folder = make_store(tmp_path / "store")
    with pytest.raises(InputError, match=r"the data holds class_labels; give .* encoded with 'encoder_hidden_states'"):
        stream_of(folder, condition_names=("class_labels", "encoder_hidden_states"))


def test_a_store_that_does_not_fit_the_configuration_is_refused(tmp_path):
    folder = str(make_store(tmp_path / "store"))
    fits = dict(source=folder, vae="digits", image_size=32, horizontal_flip=False)
    assert len(open_source(DataConfig(**fits), 0)) == 24
    for key, value in {"image_size": 64, "horizontal_flip": True, "exif_orientation": True}.items():
        with pytest.raises(InputError, match=rf"^data\.{key}="):
            open_source(DataConfig(**{**fits, key: value}), 0)


def test_learning_rate_schedules():
    constant = TrainingConfig(max_steps=100, learning_rate=1.0, warmup_steps=10)
    assert [learning_rate_at(step, constant) for step in (1, 5, 10, 11, 100)] == [0.1, 0.5, 1, 1, 1]
    cosine = TrainingConfig(max_steps=110, learning_rate=1.0, warmup_steps=10, lr_schedule="cosine")
    assert learning_rate_at(10, cosine) == 1
    assert math.isclose(learning_rate_at(60, cosine), 0.5)
    assert math.isclose(learning_rate_at(35, cosine), 0.5 + 0.5 * math.sqrt(0.5))
    assert learning_rate_at(110, cosine) == 0
    assert learning_rate_at(1, TrainingConfig(learning_rate=1.0)) == 1  # no warm-up


def test_ema_follows_its_closed_form():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, exponential(0.5))
    expected = 0.0
    for step in range(1, 31):
        torch.nn.init.constant_(model.weight, float(step))
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert math.isclose(ema.tensors["weight"].item(), expected, rel_tol=1e-6)
    # of a straight line, an average at decay d lags d / (1 - d) behind
    assert math.isclose(ema.tensors["weight"].item(), 30 - 1, rel_tol=1e-3)
    assert not ema.tensors["weight"].requires_grad
