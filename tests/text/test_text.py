"""Tokenizers and text encoders of transformers, from folders."""

import json
import shutil

import pytest
import torch
from made.captions import CAPTIONS, write_text_encoder, write_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import normalizers

from gspn_dit.errors import InputError
from gspn_dit.text import load_text_encoder, load_tokenizer, tokenize
from gspn_dit.text.tokens import token_mask, tokenizer_sha256, warn_of_cut


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return write_text_encoder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def tokenizer(encoder_folder):
    return load_tokenizer(encoder_folder.parent / "tokenizer", 12)


def test_captions_are_cut_and_filled_to_one_length(tokenizer):
    ids = tokenize(tokenizer, ["a red blue", "a " * 40, ""])
    assert ids.shape == (3, 12) and ids.dtype == torch.int64
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[0, 0] == start and ids[0, 4:].eq(end).all() and ids[0, :4].ne(end).all(), "one token a word"
    assert ids[1, -1] == end and ids[1, 1:-1].eq(ids[0, 1]).all()
    assert ids[2].tolist() == [start] + [end] * 11


def test_the_mask_ends_with_the_first_end(tokenizer):
    ids = tokenize(tokenizer, ["a red blue", ""])
    mask = token_mask(ids, tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert mask.sum(1).tolist() == [5, 2] and mask[0, :5].all() and mask[1, :2].all()
    filled_by_zero = torch.tensor([[5, 6, 1, 0, 0]])  # as T5 does
    assert token_mask(filled_by_zero, 0, 1).tolist() == [[True, True, True, False, False]]


def test_what_is_cut_is_said_once(tokenizer):
    with pytest.warns(UserWarning, match=r"cut to 12 tokens, of 42: 'a a .*'… and 1 more"):
        warn_of_cut(tokenizer, ["a red three", "a " * 40, "a " * 20])


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path, 12)
    assert tokenizer_sha256(again) == tokenizer_sha256(tokenizer)
    assert torch.equal(tokenize(again, CAPTIONS), tokenize(tokenizer, CAPTIONS))
    assert tokenizer_sha256(load_tokenizer(tmp_path, 13)) != tokenizer_sha256(tokenizer)


@pytest.mark.parametrize("change", [lambda merges: merges[:-1], lambda merges: [merges[1], merges[0], *merges[2:]]])
def test_tokenizers_that_merge_otherwise_are_told_apart(tokenizer, tmp_path, change):
    """Of the same vocabulary and length."""
    first, *merges = (write_tokenizer(tmp_path) / "merges.txt").read_text().splitlines()
    assert tokenizer_sha256(load_tokenizer(tmp_path, 12)) == tokenizer_sha256(tokenizer)
    (tmp_path / "merges.txt").write_text("\n".join([first, *change(merges)]) + "\n")
    other = load_tokenizer(tmp_path, 12)
    assert other.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_sha256(other) != tokenizer_sha256(tokenizer)


@pytest.mark.parametrize("change", [{"pad_token": "!"}, {"eos_token": "!"}, {"padding_side": "left"}, "case"])
def test_tokenizers_that_fill_up_end_or_fold_case_otherwise_are_told_apart(tokenizer, tmp_path, change):
    tokenizer.save_pretrained(tmp_path)  # what transformers 4 and 5 read as the same kind
    one, other = load_tokenizer(tmp_path, 12), load_tokenizer(tmp_path, 12)
    assert tokenizer_sha256(other) == tokenizer_sha256(one)
    if change == "case":
        other.backend_tokenizer.normalizer = normalizers.NFC()
    else:
        for name, value in change.items():
            setattr(other, name, value)
    assert tokenizer_sha256(other) != tokenizer_sha256(one)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="max_length=2"):
        load_tokenizer(tmp_path, 2)


def test_states_depend_on_a_caption_alone(encoder_folder):
    encoder = load_text_encoder(encoder_folder, max_length=12, batch_size=2)
    states, mask = encoder(CAPTIONS)
    assert states.shape == (3, 12, encoder.width) and mask.shape == (3, 12) and not states.requires_grad
    alone = encoder(CAPTIONS[2:])
    torch.testing.assert_close(states[2][mask[2]], alone.hidden_states[0][mask[2]])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(CAPTIONS[2:]).hidden_states, alone.hidden_states)


def test_the_dtype_is_the_encoders(encoder_folder):
    assert load_text_encoder(encoder_folder, dtype=torch.bfloat16)(["a"]).hidden_states.dtype == torch.bfloat16


def test_made_by_tells_weights_and_tokens_apart(encoder_folder, tmp_path):
    first = load_text_encoder(encoder_folder, max_length=12).made_by
    moved = shutil.copytree(encoder_folder.parent, tmp_path / "moved") / "text_encoder"
    assert load_text_encoder(moved, max_length=12).made_by == first
    assert load_text_encoder(moved, max_length=13).made_by != first
    assert load_text_encoder(write_text_encoder(tmp_path / "other", seed=1), max_length=12).made_by != first


def test_any_encoder_of_transformers_is_read(tmp_path):
    from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

    tokens = write_tokenizer(tmp_path / "tokenizer")
    size = len(json.loads((tokens / "vocab.json").read_text()))
    T5EncoderModel(T5Config(vocab_size=size, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    BertModel(
        BertConfig(vocab_size=size, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "bert")
    for kind, width in {"t5": 8, "bert": 24}.items():
        encoder = load_text_encoder(tmp_path / kind, tokens, max_length=12)
        assert encoder(CAPTIONS).hidden_states.shape == (3, 12, width) == (3, 12, encoder.width)


def test_a_text_encoder_without_all_its_weights_is_refused(encoder_folder, tmp_path):
    folder = shutil.copytree(encoder_folder.parent, tmp_path / "torn") / "text_encoder"
    weights = load_file(folder / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="1 of its weights are not there"):
        load_text_encoder(folder)
    with pytest.raises(InputError, match="no text encoder there"):
        load_text_encoder(tmp_path, encoder_folder.parent / "tokenizer")


def test_a_tokenizer_that_does_not_fit_is_refused(encoder_folder, tmp_path):
    with pytest.raises(InputError, match="has 77 positions"):
        load_text_encoder(encoder_folder, max_length=78)
    more = write_tokenizer(tmp_path, ("elephant",) * 3 + ("rhinoceros", "hippopotamus", "crocodile", "salamander"))
    with pytest.raises(InputError, match="vocabulary is larger"):
        load_text_encoder(encoder_folder, more)
