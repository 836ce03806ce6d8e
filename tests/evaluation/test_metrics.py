"""The figures against closed forms: Gaussians whose distance is known, logits whose score is known."""

import dataclasses
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.metric_isc import isc_features_to_metric

from gspn_dit.errors import InputError
from gspn_dit.evaluation.evaluate import evaluate
from gspn_dit.evaluation.extractors import Extractor
from gspn_dit.evaluation.image_sets import ImageSet
from gspn_dit.evaluation.metrics import (
    ClassAccuracy,
    InceptionScore,
    adm_splits,
    cost_of_order,
    frechet_distance,
    torch_fidelity_splits,
)
from gspn_dit.evaluation.moments import Moments


def gaussian(mean, covariance, count=64, seed=0):
    """Points (count, d), float64, whose sample mean and unbiased sample covariance are exactly these."""
    mean, covariance = torch.tensor(mean).double(), torch.tensor(covariance).double()
    points = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points = points - points.mean(dim=0)
    white = points @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov())).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def statistics(points, batch=50):
    moments = Moments(points.shape[1])
    for part in points.split(batch):
        moments.update(torch.tensor([]), part)
    return moments.statistics()


def distance(samples, reference):
    return frechet_distance(statistics(samples), statistics(reference))


@pytest.mark.parametrize(
    ("covariance_1", "covariance_2"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 9.0]]),
        ([[2.0, 0.7], [0.7, 1.0]], [[1.0, -0.4], [-0.4, 3.0]]),  # these two do not commute
        ([[5.0, 2.0], [2.0, 1.0]], [[0.3, 0.1], [0.1, 0.2]]),
    ],
)
def test_distance_of_two_planar_gaussians(covariance_1, covariance_2):
    # For a 2x2 matrix with positive eigenvalues a, b: tr M^½ = √a + √b = √(tr M + 2 √det M).
    product = torch.tensor(covariance_1).double() @ torch.tensor(covariance_2).double()
    trace_of_root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    traces = torch.tensor(covariance_1).double().trace() + torch.tensor(covariance_2).double().trace()
    expected = (3.0**2 + 1.5**2) + traces - 2 * trace_of_root

    samples, reference = gaussian([1.0, 2.0], covariance_1, seed=1), gaussian([4.0, 0.5], covariance_2, seed=2)
    assert distance(samples, reference) == pytest.approx(expected.item(), rel=1e-9)
    assert distance(reference, samples) == pytest.approx(expected.item(), rel=1e-9)


def test_distance_of_axis_aligned_gaussians_is_the_sum_over_axes():
    deviations_1, deviations_2 = torch.linspace(0.5, 2, 16), torch.linspace(3, 1, 16)
    samples = gaussian([0.0] * 16, deviations_1.square().diag().tolist())
    reference = gaussian([0.25] * 16, deviations_2.square().diag().tolist(), count=200, seed=3)
    expected = 16 * 0.25**2 + (deviations_1 - deviations_2).square().sum().item()
    assert distance(samples, reference) == pytest.approx(expected, rel=1e-6)


def test_a_set_is_at_no_distance_from_itself_whatever_the_order():
    points = torch.randn(300, 64, generator=torch.Generator().manual_seed(4)).relu()
    assert distance(points, points.flip(0)) == pytest.approx(0, abs=1e-6)


def test_fewer_images_than_features_stay_finite():
    points = torch.randn(20, 64, generator=torch.Generator().manual_seed(5))
    value = distance(points[:10], points.repeat(10, 1) + 1)
    # |Δμ|² alone is about 64, and no distance is below that.
    assert 50 < value < 500


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_moments_of_batches_are_those_of_the_whole(batch):
    """Also where the mean is a million times the deviations, which sums of squares do not survive."""
    points = 1e6 + torch.randn(1000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = statistics(points, batch)
    np.testing.assert_allclose(found.mu, points.mean(dim=0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma, np.cov(points.numpy(), rowvar=False), rtol=1e-8, atol=1e-9)


def inception_score(logits, splits, batch=64):
    score = InceptionScore(splits(len(logits)), logits.shape[1])
    for indices in torch.arange(len(logits)).split(batch):
        score.update(indices, logits[indices])
    return (*score.score(), len(score.counts))


def test_inception_score_of_known_answers():
    everyone_certain_of_another_class = 100 * torch.eye(100)
    score, deviation, splits = inception_score(everyone_certain_of_another_class, adm_splits)
    assert (score, deviation, splits) == (pytest.approx(100), None, 1)  # one split deviates from nothing
    # 10 classes a split
    assert inception_score(everyone_certain_of_another_class, torch_fidelity_splits) == pytest.approx((10, 0, 10))
    assert inception_score(torch.zeros(50, 7), torch_fidelity_splits) == pytest.approx((1, 0, 10))
    one_image_a_split = 100 * torch.eye(4)
    assert inception_score(one_image_a_split, torch_fidelity_splits) == pytest.approx((1, 0, 4))


def test_adm_splits_are_5000_in_the_order_they_come_and_count_alike():
    logits = 100 * torch.eye(4)[[0] * 5000 + [0, 1] * 2500 + [0, 1, 2, 3] * 1250]
    assert inception_score(logits, adm_splits) == pytest.approx(((1 + 2 + 4) / 3, (14 / 9) ** 0.5, 3))


@pytest.mark.parametrize("more", [1, 2500, 4999])
def test_what_fills_no_split_is_in_none(more):
    """One image more than a split scores 1, whatever it shows: it would halve the mean."""
    logits = 100 * torch.eye(10)[torch.arange(5000 + more) % 10]
    assert inception_score(logits, adm_splits) == (pytest.approx(10), None, 1)
    assert len(adm_splits(more)) == more  # alone they are one split


def test_the_order_of_labels_costs_what_its_splits_lack():
    def drawn(classes, count):
        return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(0)).tolist()

    ten = [label for label in range(10) for _ in range(1000)]  # five classes in each of two splits
    assert cost_of_order(ten) == pytest.approx(10 / 5, rel=0.005)
    assert cost_of_order([i % 10 for i in range(10_000)]) == pytest.approx(1, abs=1e-3)
    assert cost_of_order(drawn(10, 10_000)) == pytest.approx(1, abs=1e-3)
    # five of each of 1,000 classes in a split, unevenly: chance alone lowers the score, and is not the order's fault
    assert cost_of_order(drawn(1000, 50_000)) == pytest.approx(1, abs=0.01)
    assert cost_of_order(sorted(drawn(1000, 50_000))) > 9
    assert cost_of_order(sorted(drawn(10, 6000))) == pytest.approx(10 / 8.71, rel=0.01)  # the last classes in no split
    assert cost_of_order(sorted(drawn(10, 5000))) == 1


@pytest.mark.parametrize("count", [3, 10, 237])
def test_inception_scores_are_torch_fidelitys(count):
    logits = 5 * torch.randn(count, 30, generator=torch.Generator().manual_seed(7))
    for splits, arguments in ((torch_fidelity_splits, (min(10, count),)), (adm_splits, (1, False))):
        expected = isc_features_to_metric(logits, *arguments)
        found = inception_score(logits, splits)
        assert found[0] == pytest.approx(expected["inception_score_mean"], rel=1e-9)
        assert (found[1] or 0) == pytest.approx(expected["inception_score_std"], rel=1e-9, abs=1e-12)


def test_class_accuracy_counts_what_was_asked_for():
    accuracy = ClassAccuracy(torch.tensor([0, 1, 2, 0]))
    for i in range(4):
        accuracy.update(torch.tensor([i]), torch.eye(4)[i : i + 1])
    assert accuracy.score() == 0.75


class MeanColour(FeatureExtractorBase):
    """Features: the mean of each channel. Logits: the first two of them."""

    def __init__(self):
        super().__init__("mean-colour", ["colour", "logits"])
        self.scale = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, images):
        colour = self.scale * images.float().mean(dim=(2, 3))
        return colour, colour[:, :2]

    @staticmethod
    def get_provided_features_list():
        return "colour", "logits"


def plain_colours(centre, deviation, labels=None, names=None):
    """128 images of one colour each, at the 8 corners of a cube of colours, 16 at each."""
    bounds = [(mean - spread, mean + spread) for mean, spread in zip(centre, deviation, strict=True)]
    corners = list(itertools.product(*bounds))
    pixels = torch.tensor(corners * 16, dtype=torch.uint8)
    return ImageSet("made", 128, (4, 6), lambda i: pixels[i].view(3, 1, 1).expand(3, 4, 6), labels, class_names=names)


def made_extractor(**properties):
    return Extractor("digits", MeanColour(), Path(__file__), "fd", "classifier_score", "colour", "logits", **properties)


def test_the_whole_evaluation_with_features_of_known_statistics():
    samples = plain_colours((100, 50, 200), (10, 20, 5), labels=[0] * 128, names={0: "red"})
    reference = plain_colours((90, 50, 180), (10, 10, 5))
    metrics = evaluate(samples, reference, made_extractor(class_names=["red", "green"]))
    # Means differ by (10, 0, 20); deviations by (0, 10, 0), times 128/127 in the unbiased covariance.
    assert metrics["fd"] == pytest.approx(100 + 400 + 100 * 128 / 127, rel=1e-9)
    # The first channel (90 or 110) is always above the second (30 or 70): certain of class 0.
    assert metrics["class_accuracy"] == 1
    assert metrics["classifier_score"] == pytest.approx(1)
    assert not [key for key in metrics if "inception" in key]  # it is not Inception's
    assert "classifier_score_std" not in metrics and metrics["classifier_score_splits"] == 1
    # Every point has 15 copies, so balls are points, and the two boxes of colours have no corner in common.
    assert (metrics["precision"], metrics["recall"]) == (0, 0)
    assert "sfid" not in metrics
    assert (metrics["num_samples"], metrics["num_reference"]) == (128, 128)


def test_few_images_give_finite_figures_and_one_warning():
    """Three images leave the covariance of three features rank-deficient, and have no third neighbour."""
    few, many = (plain_colours((100, 50, 200), (10, 20, 5)) for _ in range(2))
    few = dataclasses.replace(few, count=3)
    with pytest.warns(UserWarning, match="images") as warned:
        metrics = evaluate(few, many, made_extractor())
    assert np.isfinite(metrics["fd"])
    assert "precision" not in metrics
    assert len([each for each in warned if "samples: 3 images for 3 features" in str(each.message)]) == 1
    assert len([each for each in warned if "precision" in str(each.message)]) == len(warned) - 1 == 1


@pytest.fixture
def splits_of_32(monkeypatch):
    for module in ("evaluate", "metrics"):
        monkeypatch.setattr(f"gspn_dit.evaluation.{module}.ADM_SPLIT", 32)


@pytest.mark.usefixtures("splits_of_32")
def test_splits_of_images_that_come_class_by_class_are_warned_of():
    colours = plain_colours((100, 50, 200), (10, 20, 5))
    by_class = dataclasses.replace(colours, labels=sorted([0, 1, 2, 3] * 32))
    extractor = made_extractor()
    with pytest.warns(UserWarning, match=r"makes classifier_score 3\.9 times lower; read classifier_score_torch_fid"):
        evaluate(by_class, colours, extractor)
    with pytest.warns(UserWarning, match="images come folder by folder.*read classifier_score_torch_fidelity"):
        evaluate(dataclasses.replace(colours, by_folders=True), colours, extractor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(colours, colours, extractor)
        in_turn = dataclasses.replace(colours, labels=[0, 1, 2, 3] * 32, by_folders=True)
        evaluate(in_turn, colours, extractor)  # the folders, whatever they are, do not part the classes


@pytest.mark.usefixtures("splits_of_32")
def test_images_left_out_of_the_score_are_told():
    colours = plain_colours((100, 50, 200), (10, 20, 5))
    with pytest.warns(UserWarning, match="the last 1 of 97 images fill no split of 32 and are left out") as warned:
        metrics = evaluate(dataclasses.replace(colours, count=97), colours, made_extractor())
    assert len(warned) == 1
    assert (metrics["classifier_score_splits"], metrics["classifier_score_left_out"]) == (3, 1)
    assert metrics["classifier_score_std"] >= 0
    assert "classifier_score_left_out" not in evaluate(colours, colours, made_extractor())


@pytest.mark.parametrize(
    ("names", "of_reference", "why"),
    [
        ({0: "red", 1: "green"}, None, None),
        ({1: "green"}, {0: "cat", 1: "dog"}, None),  # one of its classes; what it is compared with does not matter
        (None, {0: "red", 1: "green"}, None),  # whoever compares with these says that the samples are such
        ({0: "cat", 1: "dog"}, {0: "red", 1: "green"}, "their classes are others"),
        ({0: "red", 1: "green", 2: "blue"}, None, "their classes are others"),
        ({0: "green", 1: "red"}, None, "their classes are others"),
        (None, {0: "red", 1: "green", 2: "blue"}, "their classes are others"),
        (None, None, "their classes are not named"),
    ],
)
def test_class_accuracy_is_of_the_same_classes(names, of_reference, why):
    samples = plain_colours((100, 50, 200), (10, 20, 5), labels=[0, 1] * 64, names=names)
    reference = plain_colours((100, 50, 200), (10, 20, 5), names=of_reference)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        metrics = evaluate(samples, reference, made_extractor(class_names=["red", "green"]))
    assert metrics.get("class_accuracy") == (None if why else 0.5)
    assert [why in str(each.message) for each in warned] == ([True] if why else [])


def test_no_class_accuracy_without_labels_or_known_classes():
    names = {0: "red", 1: "green"}
    colours = plain_colours((100, 50, 200), (10, 20, 5), names=names)
    assert "class_accuracy" not in evaluate(colours, colours, made_extractor(class_names=["red", "green"]))
    labelled = dataclasses.replace(colours, labels=[0] * 128)
    assert "class_accuracy" not in evaluate(labelled, colours, made_extractor())


def test_what_does_not_suit_the_extractor_is_refused():
    colours = plain_colours((100, 50, 200), (10, 20, 5), labels=[7] * 128)
    named = dataclasses.replace(colours, class_names={0: "red", 1: "green"})
    with pytest.raises(InputError, match=r"label=7.*classes 0 to 1"):
        evaluate(colours, named, made_extractor(class_names=["red", "green"]))
    with pytest.raises(InputError, match=r"samples='made'.*4x6.*32x32"):
        evaluate(colours, colours, made_extractor(image_size=32))
    single = ImageSet("single", 1, (4, 6), colours.read)
    with pytest.raises(InputError, match=r"reference='single'.*needs 2"):
        evaluate(colours, single, made_extractor())
    larger = ImageSet("larger", 128, (8, 12), lambda i: torch.zeros(3, 8, 12, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"reference='larger': its images are 8x12, the samples 4x6"):
        evaluate(colours, larger, made_extractor())
