"""gspn-dit with cross-attention to a text: what it promises for any map, text and mask."""

import pytest
import torch
from torch import nn

from gspn_dit.errors import InputError
from gspn_dit.models import create_model, list_models
from gspn_dit.models.compiled_blocks import compile_blocks
from gspn_dit.models.macs import count_macs

SMALL = {"width": 32, "depth": 3, "num_groups": 2, "global_layers": 1, "chunk": 2, "sample_size": 8}
OWN = {"vocab_size": 40, "text_width": 16, "text_depth": 2, "text_length": 6, "pad_token": 39, "end_token": 39}
GIVEN = {"vocab_size": None, "text_width": 24, "text_length": 6}
END = 39


def small(**options) -> nn.Module:
    """A small model in which nothing is zero any more, in eval mode."""
    torch.manual_seed(0)
    model = create_model("gspn-t2i-ti-2", **{**SMALL, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return model.eval()


def inputs(model, batch=2, height=8, width=8):
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, height, width, generator=random)
    given = {"latents": latents, "timesteps": torch.rand(batch, generator=random) * 1000}
    if model.text_encoder is not None:
        ids = torch.full((batch, 6), END)
        ids[:, :4] = torch.randint(0, END, (batch, 4), generator=random)
        return given | {"input_ids": ids}
    mask = torch.arange(6) < torch.tensor([[4], [3]])[:batch]
    states = torch.randn(batch, 6, 24, generator=random)
    return given | {"encoder_hidden_states": states, "encoder_attention_mask": mask}


kinds = pytest.mark.parametrize("text", [OWN, GIVEN], ids=["own", "given"])


@kinds
def test_a_new_model_predicts_nothing(text):
    model = create_model("gspn-t2i-ti-2", **SMALL, **text)
    assert not model(**inputs(model)).any()


@kinds
@pytest.mark.parametrize("size", [(8, 8), (4, 14), (2, 2)])
def test_any_map_is_taken_and_every_token_hears_the_text(text, size):
    model = small(**text)
    given = inputs(model, height=size[0], width=size[1])
    with torch.no_grad():
        before = model(**given)
        name = "input_ids" if "input_ids" in given else "encoder_hidden_states"
        changed = given[name].clone()
        changed[0, 1] = (changed[0, 1] + 1) % END
        after = model(**{**given, name: changed})
    assert before.shape == (2, 8, *size)
    assert (after[0] - before[0]).abs().amin() > 0 and torch.equal(after[1], before[1])


def test_what_fills_a_text_up_is_not_seen():
    model = small(**GIVEN)
    given = inputs(model)
    noise = torch.randn_like(given["encoder_hidden_states"])
    other = torch.where(given["encoder_attention_mask"][..., None], given["encoder_hidden_states"], noise)
    with torch.no_grad():
        assert torch.equal(model(**given), model(**{**given, "encoder_hidden_states": other}))


def test_a_texts_length_changes_nothing_but_its_room():
    """Texts padded to four, five or six tokens are the same text."""
    model = small(**OWN)
    given = inputs(model)
    given["input_ids"][:, 3:] = END
    with torch.no_grad():
        wide, narrow = (model(**{**given, "input_ids": given["input_ids"][:, :length]}) for length in (6, 4))
    torch.testing.assert_close(wide, narrow, rtol=1e-4, atol=1e-4)


def test_a_text_without_tokens_gives_numbers():
    model = small(**GIVEN)
    given = inputs(model)
    given["encoder_attention_mask"] = torch.zeros(2, 6, dtype=torch.bool)
    with torch.no_grad():
        assert model(**given).isfinite().all()


@kinds
def test_rows_do_not_depend_on_their_batch(text):
    model = small(**text)
    given = inputs(model)
    with torch.no_grad():
        both = model(**given)
        alone = model(**{name: tensor[1:] for name, tensor in given.items()})
    torch.testing.assert_close(both[1:], alone)


@kinds
def test_every_parameter_is_learned(text):
    model = small(**text).train()
    model.enable_gradient_checkpointing()
    model(**inputs(model)).square().mean().backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


def test_chunk_scale_lengthens_chunks():
    model = small(**OWN)
    given = inputs(model, height=16, width=16)
    with torch.no_grad():
        assert not torch.equal(model(**given), model(**given, chunk_scale=2.0))


@kinds
def test_a_saved_model_is_the_same(text, tmp_path):
    model = small(**text)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs(model)), again(**inputs(model)))


def test_text_of_the_other_kind_is_refused():
    own, given = small(**OWN), small(**GIVEN)
    with pytest.raises(InputError, match="has a text encoder of its own"):
        own(**inputs(given))
    with pytest.raises(InputError, match="has no text encoder of its own"):
        given(**inputs(own))
    with pytest.raises(InputError, match=r"input_ids: shape \(2, 7\)"):
        own(**{**inputs(own), "input_ids": torch.zeros(2, 7, dtype=torch.long)})
    with pytest.raises(InputError, match=r"encoder_hidden_states: shape \(2, 6, 25\)"):
        given(**{**inputs(given), "encoder_hidden_states": torch.zeros(2, 6, 25)})
    with pytest.raises(InputError, match=r"encoder_attention_mask: shape \(2, 5\)"):
        given(**{**inputs(given), "encoder_attention_mask": torch.ones(2, 5)})


@kinds
def test_macs_of_blocks_are_linear_in_pixels(text):
    with torch.device("meta"):
        model = create_model("gspn-t2i-ti-2", **SMALL, **text)
    one, two, three = (count_macs(model, (8, 8 * n)) for n in (1, 2, 3))
    assert 0 < two - one == three - two
    tokens, width, length = 16, 32, 6
    attention = 2 * width**2 + 2 * length * width  # of a token: query, output, scores and their sum of values
    with torch.device("meta"):
        of_classes = create_model("gspn-dit-ti-2", **SMALL)
    without = count_macs(of_classes, (8, 16)) - count_macs(of_classes, (8, 8))
    assert two - one == without + 3 * tokens * attention


def test_all_sizes_are_listed():
    assert [name for name in list_models("gspn-t2i-*") if name.endswith("-2")] == [
        f"gspn-t2i-{size}-2" for size in ("ti", "s", "b", "l", "xl")
    ]


@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    model = small(**OWN)
    with torch.no_grad():
        usual = model(**inputs(model))
        compile_blocks(model)
        torch.testing.assert_close(model(**inputs(model)), usual, rtol=1e-4, atol=1e-4)
