"""Class labels as a condition: what is read, the null class, and what is dropped."""

import pytest
import torch

from gspn_dit.conditioning import ClassLabels
from gspn_dit.errors import InputError

ANIMALS = ClassLabels(3, ["golden retriever", "tabby cat", "goldfish"])


def test_ids_and_names_are_read_one_or_many():
    for given, ids in ((2, [2]), ("goldfish", [2]), ([0, "tabby cat", "2"], [0, 1, 2])):
        condition = ANIMALS.read(given)
        assert list(condition) == list(ANIMALS.names) == ["class_labels"]
        assert condition["class_labels"].dtype == torch.long
        assert condition["class_labels"].tolist() == ids


def test_what_is_no_class_is_refused_by_name():
    for given, says in ((3, "classes 0 to 2"), ([], "wanted one class id"), ("goldfisch", "did you mean 'goldfish'")):
        with pytest.raises(InputError, match=says):
            ANIMALS.read(given)
    with pytest.raises(InputError, match="have no names; give ids 0 to 9"):
        ClassLabels(10).read("seven")


def test_dropping_puts_the_null_class_where_the_mask_is_and_nowhere_else():
    condition = ANIMALS.read([0, 1, 2, 1])
    dropped = ANIMALS.drop(condition, torch.tensor([True, False, True, False]))
    assert dropped["class_labels"].tolist() == [3, 1, 3, 1]
    assert condition["class_labels"].tolist() == [0, 1, 2, 1], "what was given stays as it is"
    everything = ANIMALS.drop(condition, torch.ones(4, dtype=torch.bool))
    assert torch.equal(everything["class_labels"], ANIMALS.null(4)["class_labels"])
    assert ANIMALS.null(4)["class_labels"].dtype == torch.long
