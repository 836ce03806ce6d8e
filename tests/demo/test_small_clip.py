"""The small CLIP learns which caption is a picture's, and what it writes is a text encoder that transformers reads."""

import pytest
import torch
from transformers import CLIPTextModel

from gspn_dit.commands import SmallCLIPOptions
from gspn_dit.demo.scenes import Scenes
from gspn_dit.demo.small_clip import TOKENS, SmallCLIP, agreement, main, train
from gspn_dit.errors import InputError
from gspn_dit.options import parse
from gspn_dit.storage.packaged import PACKAGED_TOKENIZERS
from gspn_dit.text.tokens import load_tokenizer, tokenize


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PACKAGED_TOKENIZERS["scenes"], TOKENS)


def test_it_learns_captions(tokenizer):
    torch.manual_seed(0)
    model = SmallCLIP(tokenizer)
    model.eval()
    before = agreement(model, Scenes("train", seed=1), 60)
    train(model.train(), SmallCLIPOptions("unused", steps=40, batch_size=24))
    after = agreement(model, Scenes("train", seed=1), 60)
    assert after[0] > max(2 / 60, before[0])  # by chance it is 1 in 60


def test_no_caption_of_a_scene_is_cut(tokenizer):
    longest = "a cyan 3 right of a cyan 7 and below a cyan 1"
    assert tokenize(tokenizer, [longest])[0].tolist().count(tokenizer.eos_token_id) == 1  # the last: it is just full


def test_the_loss_counts_contrary_captions(tokenizer):
    torch.manual_seed(0)
    model, scenes = SmallCLIP(tokenizer).eval(), Scenes()
    images, captions = torch.stack([scenes[i][0] for i in range(4)]), [scenes.caption(i) for i in range(4)]
    assert model.loss(images, captions, captions) > model.loss(images, captions, [])


def test_what_it_writes_is_a_text_encoder(tmp_path, capsys):
    main(SmallCLIPOptions(str(tmp_path / "clip"), steps=1, batch_size=2))
    assert "of 1,000 held-out scenes" in capsys.readouterr().out
    model = CLIPTextModel.from_pretrained(tmp_path / "clip")
    assert model.config.max_position_embeddings == TOKENS and model.config.hidden_size == 64
    with pytest.raises(InputError, match="out="):
        main(SmallCLIPOptions(str(tmp_path / "clip"), steps=1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--batch-size", "1"], "batch-size=1: wanted 2 or more"), (["--steps", "0"], "steps=0: wanted 1 or more")],
)
def test_what_cannot_be_is_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        parse(SmallCLIPOptions, ["--out", "x", *arguments], exit_on_error=False)
