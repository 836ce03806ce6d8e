"""CLIP's vocabulary, as it is packaged."""

import pytest

from gspn_dit.errors import InputError
from gspn_dit.storage.packaged import PACKAGED_TOKENIZERS
from gspn_dit.text.tokens import load_tokenizer, tokenize


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PACKAGED_TOKENIZERS["scenes"], 16)


def test_words_have_the_ids_that_clip_published(tokenizer):
    (ids,) = tokenize(tokenizer, ["a photo of an astronaut riding a horse"]).tolist()
    assert ids == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407, *[49407] * 6]
    assert len(tokenizer) == 49408 and tokenize(tokenizer, [""]).tolist() == [[49406, *[49407] * 15]]


def test_letters_of_all_scripts_and_digits_become_tokens_and_come_back(tokenizer):
    for caption in ("a red 3 left of a blue 7", "crème brûlée", "ein roter würfel", "красный 3"):
        (ids,) = tokenize(tokenizer, [caption])
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption
    longer, cut = tokenize(tokenizer, ["a " * 100, "a " * 14])
    assert longer.tolist() == cut.tolist()


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^tokenizer=.*holds no tokenizer"):
        load_tokenizer(tmp_path)
