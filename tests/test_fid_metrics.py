"""The figures against closed forms: Gaussians whose distance is known, logits whose score is known."""

import itertools
from pathlib import Path

import pytest
import torch
from torch_fidelity import FeatureExtractorBase

from gspn_dit.errors import InputError
from gspn_dit.fid.evaluate import evaluate
from gspn_dit.fid.extractors import Extractor
from gspn_dit.fid.images import ImageSet
from gspn_dit.fid.metrics import class_accuracy, frechet_distance, inception_score, statistics


def gaussian(mean, covariance, count=64, seed=0):
    """Points (count, d), float64, whose sample mean and unbiased sample covariance are exactly these."""
    mean, covariance = torch.tensor(mean).double(), torch.tensor(covariance).double()
    points = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points = points - points.mean(dim=0)
    white = points @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov())).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def distance(samples, reference):
    return frechet_distance(statistics(samples, "samples"), statistics(reference, "reference"))


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


def test_fewer_images_than_features_warn_and_stay_finite():
    points = torch.randn(20, 64, generator=torch.Generator().manual_seed(5))
    with pytest.warns(UserWarning, match="samples: 10 images for 64 features"):
        value = distance(points[:10], points.repeat(10, 1) + 1)
    # |Δμ|² alone is about 64, and no distance is below that.
    assert 50 < value < 500


def test_inception_score_of_known_answers():
    everyone_certain_of_another_class = 100 * torch.eye(100)
    assert inception_score(everyone_certain_of_another_class) == pytest.approx((10, 0, 10))  # 10 classes a split
    assert inception_score(torch.zeros(50, 7)) == pytest.approx((1, 0, 10))
    one_image_a_split = 100 * torch.eye(4)
    assert inception_score(one_image_a_split) == pytest.approx((1, 0, 4))


def test_class_accuracy_counts_what_was_asked_for():
    assert class_accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


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


def plain_colours(centre, deviation, labels=None):
    """128 images of one colour each, at the 8 corners of a cube of colours, 16 at each."""
    bounds = [(mean - spread, mean + spread) for mean, spread in zip(centre, deviation, strict=True)]
    corners = list(itertools.product(*bounds))
    pixels = torch.tensor(corners * 16, dtype=torch.uint8)
    return ImageSet("made", 128, (4, 6), lambda i: pixels[i].view(3, 1, 1).expand(3, 4, 6), labels)


def made_extractor(**properties):
    return Extractor("digits", MeanColour(), Path(__file__), "fd", "colour", "logits", **properties)


def test_the_whole_evaluation_with_features_of_known_statistics():
    samples = plain_colours((100, 50, 200), (10, 20, 5), labels=[0] * 128)
    reference = plain_colours((90, 50, 180), (10, 10, 5))
    metrics = evaluate(samples, reference, made_extractor(num_classes=2))
    # Means differ by (10, 0, 20); deviations by (0, 10, 0), times 128/127 in the unbiased covariance.
    assert metrics["fd"] == pytest.approx(100 + 400 + 100 * 128 / 127, rel=1e-9)
    # The first channel (90 or 110) is always above the second (30 or 70): certain of class 0.
    assert metrics["class_accuracy"] == 1
    assert metrics["inception_score"] == pytest.approx(1)
    assert (metrics["num_samples"], metrics["num_reference"]) == (128, 128)


def test_no_class_accuracy_without_labels_or_known_classes():
    colours = plain_colours((100, 50, 200), (10, 20, 5))
    assert "class_accuracy" not in evaluate(colours, colours, made_extractor(num_classes=2))
    labelled = plain_colours((100, 50, 200), (10, 20, 5), labels=[0] * 128)
    assert "class_accuracy" not in evaluate(labelled, colours, made_extractor())


def test_what_does_not_suit_the_extractor_is_refused():
    colours = plain_colours((100, 50, 200), (10, 20, 5), labels=[7] * 128)
    with pytest.raises(InputError, match=r"label=7.*classes 0 to 1"):
        evaluate(colours, colours, made_extractor(num_classes=2))
    with pytest.raises(InputError, match=r"samples=made.*4x6.*32x32"):
        evaluate(colours, colours, made_extractor(image_size=32))
    single = ImageSet("single", 1, (4, 6), colours.read)
    with pytest.raises(InputError, match=r"reference=single.*needs 2"):
        evaluate(colours, single, made_extractor())
