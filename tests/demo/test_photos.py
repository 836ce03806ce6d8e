"""The packaged photos classifier knows the photographs at any size; its distance grows with what spoils them."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from gspn_dit.data import open_images
from gspn_dit.demo.classifier import PhotosClassifier, accuracy, images_and_labels
from gspn_dit.evaluation.evaluate import evaluate
from gspn_dit.evaluation.extractors import create_extractor
from gspn_dit.evaluation.image_sets import ImageSet
from gspn_dit.evaluation.metrics import frechet_distance
from gspn_dit.evaluation.moments import Moments
from gspn_dit.storage.packaged import PACKAGED_CLASSIFIERS

WEIGHTS = PACKAGED_CLASSIFIERS["photos"]
COUNT = 320
pytestmark = pytest.mark.skipif(
    not WEIGHTS.exists(), reason="no weights: `gspn-dit classifier --data photos` makes them"
)


@pytest.fixture(scope="module")
def held_out():
    return images_and_labels(PhotosClassifier, "test", COUNT)


@pytest.fixture(scope="module")
def extractor():
    return create_extractor("photos")


@pytest.mark.slow
def test_it_recognises_crops_it_never_saw_mirrored_and_at_other_sizes(held_out):
    images, labels = held_out
    model = PhotosClassifier.load(WEIGHTS)
    assert WEIGHTS.stat().st_size < 1e6
    assert accuracy(model, images, labels) > 0.95
    assert accuracy(model, images.flip(3), labels) > 0.95
    larger = open_images("photos", 100, split="test")
    assert accuracy(model, torch.stack([larger[i][0] for i in range(96)]), labels[:96]) > 0.95


@pytest.mark.slow
def test_its_distance_grows_with_blur_and_with_noise(held_out, extractor):
    images, _ = held_out

    def statistics(images):
        moments = Moments(64)
        moments.update(torch.arange(len(images)), extractor(images)["64"])
        return moments.statistics()

    def distance(images):
        return frechet_distance(statistics(images), reference)

    def noisy(deviation):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + deviation * noise).round().clamp(0, 255).to(torch.uint8)

    def blurred(side):
        return avg_pool2d(images.float(), side, 1, side // 2, count_include_pad=False).round().to(torch.uint8)

    reference = statistics(images_and_labels(PhotosClassifier, "train", COUNT)[0])
    spoilt = [
        [distance(images), *map(blurred_or_noisy, amounts)]
        for blurred_or_noisy, amounts in (
            (lambda side: distance(blurred(side)), (3, 5, 9)),
            (lambda deviation: distance(noisy(deviation)), (15, 30, 60)),
        )
    ]
    for distances in spoilt:
        assert distances == sorted(distances)
        assert distances[-1] > 3 * distances[0]


def test_the_evaluation_takes_photos_of_any_size(extractor):
    def crops(split, count):
        photos = open_images("photos", 48, split=split)
        labels = [photos[i][1] for i in range(count)]
        names = dict(enumerate(photos.class_names))
        return ImageSet(split, count, (48, 48), lambda i: photos[i][0], labels, class_names=names)

    figures = evaluate(crops("test", 64), crops("train", 64), extractor)
    assert figures["features"] == "photos" and figures["fd"] > 0
    assert figures["class_accuracy"] > 0.9
    assert figures["classifier_score"] <= 16
