"""Text as a condition: what is read, what no words are, and what is dropped."""

import pytest
import torch

from gspn_dit.conditioning import EncodedTokens, TextStates, TextTokens
from gspn_dit.errors import InputError

TABLE = torch.arange(30.0).view(10, 3)  # a state for each token


def tokenize(captions):
    """A token for each letter, 1 to 5, filled up with zeros to four."""
    return torch.tensor(
        [[ord(c) - ord("a") + 1 for c in caption[:4]] + [0] * (4 - len(caption)) for caption in captions]
    )


def encode(ids):
    return TABLE[ids], ids != 0


MASK = torch.tensor([True, False])


def test_tokens_are_read_and_dropped():
    text = TextTokens(tokenize)
    read = text.read(["abc", "d"])
    assert read["input_ids"].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]
    dropped = text.drop(read, MASK)
    assert dropped["input_ids"].tolist() == [[0] * 4, [4, 0, 0, 0]] and read["input_ids"][0, 0] == 1
    assert torch.equal(text.null(2)["input_ids"], tokenize(["", ""]))
    assert torch.equal(text.read("abc")["input_ids"], read["input_ids"][:1])


def test_states_are_those_of_the_tokens_and_null_those_of_no_words():
    text = TextStates(tokenize, encode)
    read, null = text.read(["abc", "d"]), text.null(2)
    states, mask = encode(tokenize(["abc", "d"]))
    assert tuple(read) == text.names and torch.equal(read[text.names[0]], states)
    dropped = text.drop(read, MASK)
    for name in text.names:
        assert null[name].shape == read[name].shape
        assert torch.equal(dropped[name][0], null[name][0]) and torch.equal(dropped[name][1], read[name][1])
    assert torch.equal(read[text.names[1]], mask) and not null[text.names[1]].any()


def test_stored_states_keep_their_dtype():
    text = TextStates(tokenize, encode)
    stored = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in text.read(["abc", "d"]).items()
    }
    dropped = text.drop(stored, MASK)
    assert {name: tensor.dtype for name, tensor in dropped.items()} == {
        name: tensor.dtype for name, tensor in stored.items()
    }


def test_tokens_of_the_data_become_states_as_they_are_dropped():
    on_the_fly, stored = EncodedTokens(tokenize, encode), TextStates(tokenize, encode)
    ids = TextTokens(tokenize).read(["abc", "d"])
    assert tuple(ids) == on_the_fly.names
    first, second = on_the_fly.drop(ids, MASK), stored.drop(stored.read(["abc", "d"]), MASK)
    assert all(torch.equal(first[name], second[name]) for name in stored.names) and tuple(first) == stored.names
    assert all(torch.equal(on_the_fly.read("abc")[name], stored.read("abc")[name]) for name in stored.names)


@pytest.mark.parametrize("given", [[], 3, ["a", 3], None])
def test_what_is_no_text_is_refused(given):
    with pytest.raises(InputError, match="prompt="):
        TextTokens(tokenize).read(given)
