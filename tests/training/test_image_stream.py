"""How training pictures are altered: a function of seed and position, whatever the processes, in its right measure."""

import pickle
import random

import numpy as np
import pytest
import torch
from made.classifying import CLASSES, SIZE, write_idx_folder
from torch.utils.data import DataLoader

from gspn_dit.classifier_config import AugmentationConfig
from gspn_dit.data.pictures import open_training
from gspn_dit.data.preparation import Preparation
from gspn_dit.data.workers import load
from gspn_dit.errors import InputError
from gspn_dit.training.image_stream import Mixing, ResizedImages, Resizing, ShiftedImages, global_draws
from gspn_dit.training.positions import EpochOrder, StepSampler

EVERYTHING = AugmentationConfig(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.5)
BATCH = 8
PREPARATION = Preparation(SIZE, (0.5,), (0.5,), crop_pct=1.0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return open_training(str(write_idx_folder(tmp_path_factory.mktemp("idx") / "data")), SIZE)[0]


def shifted(pictures, seed=3, **options):
    given = AugmentationConfig(**{"crop": "shift", "color_jitter": 0, "horizontal_flip": 0, **options})
    return ShiftedImages(pictures, PREPARATION, given, seed, BATCH)


def resized(pictures, seed=3):
    return ResizedImages(pictures, PREPARATION, EVERYTHING, seed)


def test_an_item_is_a_function_of_seed_and_position(pictures):
    stream = resized(pictures)
    first = [stream[n] for n in (0, 7, 30)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    again = pickle.loads(pickle.dumps(resized(pictures)))
    for n, sample in reversed(list(zip((0, 7, 30), first, strict=True))):
        assert torch.equal(sample["images"], again[n]["images"]) and sample["labels"] == again[n]["labels"]
    assert not torch.equal(resized(pictures, seed=4)[7]["images"], first[1]["images"])
    assert first[0]["images"].shape == (1, SIZE, SIZE)


def test_posterising_leaves_something_of_a_picture_at_any_magnitude(pictures):
    (policy,) = [step for step in resized(pictures).transform.transforms if hasattr(step, "ops")]
    (posterize,) = [op for op in policy.ops if op.name.startswith("Posterize")]
    posterize.prob = 1.0
    for magnitude in (0, 5, 9, 10):
        posterize.magnitude, posterize.magnitude_std = magnitude, 0
        pixels = np.array(posterize(pictures.picture(0)))
        assert len(np.unique(pixels)) > 1


def test_what_others_draw_is_left_alone(pictures):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    resized(pictures)[0]
    with global_draws(1, 2):
        inside = drawn()
    assert drawn() == expected != inside
    with global_draws(1, 2):
        assert drawn() == inside


@pytest.mark.parametrize("kind", [shifted, resized])
@pytest.mark.parametrize(("processes", "accumulation", "workers"), [(2, 1, 0), (1, 4, 2), (2, 2, 1)])
def test_a_step_holds_the_same_pictures_however_it_is_split(pictures, kind, processes, accumulation, workers):
    options = {"max_shift": 2, "horizontal_flip": 0.5, "erasing": 0.5} if kind is shifted else {}
    stream = kind(pictures, **options)

    def read(rank, processes, accumulation, workers):
        steps = StepSampler(2, 4, batch_size=BATCH, accumulation=accumulation, rank=rank, processes=processes)
        return list(steps), list(load(stream, steps, workers, stream.collate))

    places, whole = read(0, 1, 1, 0)
    expected = {
        n: row for at, batch in zip(places, whole, strict=True) for n, row in zip(at, batch["images"], strict=True)
    }
    assert len(expected) == 2 * BATCH
    seen = set()
    for rank in range(processes):
        for at, batch in zip(*read(rank, processes, accumulation, workers), strict=True):
            for n, image in zip(at, batch["images"], strict=True):
                assert torch.equal(image, expected[n])
                seen.add(n)
    assert seen == set(expected)


def test_a_shifted_picture_is_a_part_of_the_picture_with_a_border(pictures):
    stream, shift, offsets = shifted(pictures, max_shift=2), 2, []
    for start in range(0, 40 * BATCH, BATCH):
        positions = list(range(start, start + BATCH))
        batch = stream.__getitems__(positions)
        for n, image, label in zip(positions, batch["images"], batch["labels"], strict=True):
            index = stream.order(n)
            assert label == pictures.label(index)
            padded = torch.nn.functional.pad(pictures.array[index], (shift,) * 4)
            found = [
                (down, right)
                for down in range(2 * shift + 1)
                for right in range(2 * shift + 1)
                if torch.equal(PREPARATION.normalise(padded[:, down : down + SIZE, right : right + SIZE]), image)
            ]
            assert len(found) == 1
            offsets += found
    down, right = np.array(offsets).T
    assert set(down) == set(right) == set(range(5))
    assert abs(down.mean() - 2) < 0.3 and abs(right.mean() - 2) < 0.3  # four standard deviations of 320 draws
    assert abs(np.corrcoef(down, right)[0, 1]) < 0.25


def test_the_shares_that_are_mirrored_and_erased_are_the_options(pictures):
    plain, mirrored, erased = (
        torch.cat([stream.__getitems__(list(range(s, s + BATCH)))["images"] for s in range(0, 800, BATCH)])
        for stream in (shifted(pictures), shifted(pictures, horizontal_flip=0.5), shifted(pictures, erasing=0.25))
    )
    flips = (mirrored == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(torch.where(flips[:, None, None, None], plain.flip(-1), plain), mirrored)
    assert abs(flips.float().mean() - 0.5) < 0.07
    share = (erased != plain).flatten(1).any(1).float().mean()
    assert abs(share - 0.25) < 0.07
    altered = (erased != plain).flatten(1).float().mean(1)
    assert altered.max() < 0.5  # of a picture


def test_an_epoch_shows_every_picture_once(pictures):
    stream, count = shifted(pictures), len(pictures)
    shown = torch.cat([stream.__getitems__(list(range(s, s + BATCH)))["images"] for s in range(0, 2 * count, BATCH)])
    first, second = (sorted(map(float, part.flatten(1).sum(1))) for part in shown.split(count))
    assert first == second and not torch.equal(*shown.split(count))
    order = EpochOrder(count, 3)
    assert order.many(np.arange(50)).tolist() == [order(n) for n in range(50)]


@pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_neighbours_are_mixed_and_their_labels_alike(kind):
    mixing = Mixing(AugmentationConfig(**kind, label_smoothing=0.1), 4, seed=0)
    images = torch.arange(1.0, 9).view(8, 1, 1, 1).expand(8, 1, 16, 16).clone()
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    mixed_at_all = 0
    for step in range(20):
        mixed, targets = mixing(images.clone(), labels, step)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        assert targets.min() >= 0.1 / 4 - 1e-6  # every class has its part of the smoothing
        values = mixed.mean((1, 2, 3))
        for image, value, target in zip(mixed, values, targets, strict=True):
            pair = min(range(0, 8, 2), key=lambda k: abs(float(value) - (k + 1.5)))
            low, high = pair + 1.0, pair + 2.0
            assert low - 1e-5 <= float(image.min()) and float(image.max()) <= high + 1e-5
            share = float(value) - low  # of the second of the pair
            expected = torch.full((4,), 0.1 / 4)
            expected[labels[pair]] += 0.9 * (1 - share)
            expected[labels[pair + 1]] += 0.9 * share
            torch.testing.assert_close(target, expected, rtol=0, atol=1e-4)
        mixed_at_all += not torch.equal(values.sort().values, torch.arange(1.0, 9))
    assert mixed_at_all >= 15


def test_a_step_is_mixed_alike_however_it_is_split():
    mixing = Mixing(AugmentationConfig(mixup=0.8, cutmix=1.0), 4, seed=0)
    images, labels = torch.rand(8, 1, 6, 6), torch.arange(8) % 4

    def rows(parts, step):
        done = [mixing(images[part].clone(), labels[part], step) for part in parts]
        return sorted(torch.cat([torch.cat([i.flatten(1), t], 1) for i, t in done]).tolist())

    whole = [rows([slice(0, 8)], step) for step in range(6)]
    assert whole == [rows([slice(0, 2), slice(2, 8)], step) for step in range(6)]
    assert whole[0] != whole[1]


def test_without_mixing_at_a_step_the_labels_are_smoothed_alone():
    mixing = Mixing(AugmentationConfig(mixup=0.8, mix_probability=1e-9, label_smoothing=0.2), 4, seed=0)
    images = torch.rand(4, 1, 6, 6)
    mixed, targets = mixing(images.clone(), torch.tensor([0, 1, 2, 3]), 1)
    assert torch.equal(mixed[[0, 3, 1, 2]], images)
    assert targets[0].tolist() == pytest.approx([0.85, 0.05, 0.05, 0.05])


def test_half_of_a_size_is_drawn_as_often_as_twice_the_size():
    resizing, images = Resizing((7, 28), seed=0), torch.rand(2, 3, 14, 14)
    sides = np.array([resizing.side(step) for step in range(2000)])
    assert set(sides) == set(range(7, 29))
    assert abs((sides < 14).mean() - np.log(13.5 / 7) / np.log(4)) < 0.045  # four standard deviations
    assert abs(np.corrcoef(sides[1:], sides[:-1])[0, 1]) < 0.1
    again, other = (Resizing((7, 28), seed=seed) for seed in (0, 1))
    assert [again.side(step) for step in (5, 1999, 3)] == sides[[5, 1999, 3]].tolist()
    assert [other.side(step) for step in range(20)] != sides[:20].tolist()
    for step in range(5):
        assert resizing(images, step).shape == (2, 3, sides[step], sides[step])


def test_a_picture_of_another_size_is_the_same_picture():
    rows = torch.linspace(-1, 1, 12)[:, None].expand(1, 1, 12, 12)
    assert torch.equal(Resizing((12, 12), seed=0)(rows, 1), rows)
    for side in (8, 16):
        resized = Resizing((side, side), seed=0)(rows, 1)
        centres = (torch.arange(side) + 0.5) * 12 / side - 0.5  # of the new pixels among the old ones
        torch.testing.assert_close(resized[0, 0, 2:-2, 0], (centres * 2 / 11 - 1)[2:-2], rtol=0, atol=0.01)
        torch.testing.assert_close(resized, resized[..., :1].expand_as(resized), rtol=0, atol=1e-6)


def test_pictures_that_cannot_be_shifted_are_refused(pictures):
    for preparation in (Preparation(SIZE + 1, (0.5,), (0.5,)), Preparation(SIZE, (0.5,) * 3, (0.5,) * 3)):
        with pytest.raises(InputError, match=r"^augmentation\.crop='shift': takes images that are in memory"):
            ShiftedImages(pictures, preparation, AugmentationConfig(crop="shift", color_jitter=0), 0, BATCH)


def test_colour_pictures_are_shown_to_a_grey_network_and_the_other_way_round(pictures):
    grey = ResizedImages(pictures, Preparation(SIZE, (0.5,) * 3, (0.5,) * 3), EVERYTHING, 0)
    assert grey[0]["images"].shape == (3, SIZE, SIZE)
    assert sorted(int(grey[n]["labels"]) for n in range(24)) == sorted([*range(CLASSES)] * 8)
    batch = next(iter(DataLoader(grey, batch_sampler=[[0, 1, 2, 3]])))
    assert batch["images"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
