"""Top-1 and top-5 accuracy, by hand."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from gspn_dit.evaluation.accuracy import scores, tally, tally_of

# Seven classes; by row the label is likeliest, third, fifth, sixth and last.
LOGITS = torch.tensor(
    [
        [9.0, 8, 7, 6, 5, 4, 3],
        [9.0, 8, 7, 6, 5, 4, 3],
        [9.0, 8, 7, 6, 5, 4, 3],
        [9.0, 8, 7, 6, 5, 4, 3],
        [3.0, 4, 5, 6, 7, 8, 9],
    ]
)
LABELS = torch.tensor([0, 2, 4, 5, 0])


def test_a_case_by_hand():
    found = scores(tally_of(LOGITS, LABELS))
    assert (found["top1"], found["top5"], found["num_images"]) == (20.0, 60.0, 5)
    normaliser = float(torch.logsumexp(LOGITS[0], 0))
    assert found["loss"] == pytest.approx(normaliser - (9 + 7 + 5 + 4 + 3) / 5, rel=1e-6)


def test_parts_add_up_to_the_whole():
    batches = [(LOGITS[:2], LABELS[:2]), (LOGITS[2:], LABELS[2:])]
    sums = tally(nn.Identity(), batches, torch.device("cpu"), nullcontext)
    assert scores(sums) == pytest.approx(scores(tally_of(LOGITS, LABELS)))
    assert scores(tally_of(*batches[0]) + tally_of(*batches[1])) == pytest.approx(scores(sums))


def test_of_few_classes_all_are_among_the_five_likeliest():
    assert scores(tally_of(torch.eye(3), torch.tensor([1, 1, 1])))["top5"] == 100
