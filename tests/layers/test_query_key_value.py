"""How queries, keys and values of a map are mixed."""

import pytest
import torch

from gspn_dit.layers.query_key_value import GSPNMixing, LinearMixing, WindowMixing
from gspn_dit.layers.windows import Window

MIXINGS = (GSPNMixing, LinearMixing, WindowMixing)
BATCH, HEIGHT, WIDTH, CHANNELS, HEADS = 2, 9, 14, 12, 3


def maps(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, BATCH, HEIGHT, WIDTH, CHANNELS, generator=generator).unbind())


def stirred(mixing):
    """The mixing with weights away from their start, where some have no effect yet."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in mixing.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixing


def in_tokens(x):
    """(B, heads, N, D)"""
    return x.flatten(1, 2).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def in_map(x):
    return x.transpose(1, 2).reshape(BATCH, HEIGHT, WIDTH, CHANNELS)


@pytest.mark.parametrize("mixing_class", MIXINGS)
@pytest.mark.parametrize("chunk", [None, 4, Window(6, shifted=True)])
def test_a_new_one_averages_values(mixing_class, chunk):
    """A map of one value stays so, up to its borders: the weights of every token's mean sum to 1."""
    x, query, key, value = maps()
    constant = value[:1, :1, :1].expand_as(value)
    y = mixing_class(CHANNELS, HEADS)(x, query, key, constant, chunk)
    torch.testing.assert_close(y, constant, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixing_class", MIXINGS)
def test_heads_and_images_are_apart(mixing_class):
    x, *parts = maps()
    mixing = stirred(mixing_class(CHANNELS, HEADS))
    before = mixing(x, *parts, 6)
    others = maps(3, seed=1)
    own = slice(CHANNELS // HEADS, 2 * CHANNELS // HEADS)
    for part, other in zip(parts, others, strict=True):
        part[1] = other[1]
        part[0, ..., : own.start], part[0, ..., own.stop :] = other[0, ..., : own.start], other[0, ..., own.stop :]
    y = mixing(x, *parts, 6)
    torch.testing.assert_close(y[0, ..., own], before[0, ..., own])
    assert not torch.allclose(y[0, ..., : own.start], before[0, ..., : own.start])


@pytest.mark.parametrize("mixing_class", MIXINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(mixing_class, dtype):
    parts = maps()
    mixing = stirred(mixing_class(CHANNELS, HEADS))
    exact = mixing(*parts, 6)
    y = mixing.to(dtype)(*(part.to(dtype) for part in parts), 6)
    assert y.dtype == dtype
    assert (y.float() - exact).norm() < 0.03 * exact.norm()


def test_scans_start_as_a_mean_of_the_neighbourhood():
    """Weights fall with the distance and are the same in all four directions."""
    _, query, key, _ = maps()
    side = 9
    value = torch.zeros(1, side, side, CHANNELS)
    value[:, 4, 4] = 1
    nothing = torch.zeros_like(value)  # the gates that are read from it are the same for all neighbours
    y = GSPNMixing(CHANNELS, HEADS)(nothing, query[:1, :, :side], key[:1, :, :side], value)[0]
    assert (y >= 0).all()
    torch.testing.assert_close(y, y.transpose(0, 1))
    torch.testing.assert_close(y, y.flip(0))
    assert (y[4, 4] > y[4, 6]).all() and (y[4, 6] > y[4, 8]).all() and (y[4, 8] > 0).all()


def test_scans_are_linear_in_values_and_gated_by_keys_and_queries():
    x, query, key, value = maps()
    mixing = stirred(GSPNMixing(CHANNELS, HEADS))
    y = mixing(x, query, key, value)
    torch.testing.assert_close(mixing(x, query, key, 2 * value), 2 * y)
    query[:, 3, 5] += 1  # what is read at a token
    changed = (mixing(x, query, key, value) != y).any(-1)
    assert changed[:, 3, 5].all() and changed.sum() == BATCH
    key[:, 3, 5] += 1  # what a token gives to the others
    assert (mixing(x, query, key, value) != y).any(-1).sum() > BATCH * HEIGHT


def test_all_weights_of_scans_are_trained():
    mixing = GSPNMixing(CHANNELS, HEADS)
    mixing(*maps()).square().sum().backward()
    still = [name for name, parameter in mixing.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert still == []


def test_linear_attention_is_what_all_pairs_give():
    x, query, key, value = maps()
    mixing = stirred(LinearMixing(CHANNELS, HEADS))
    q, k, v = (in_tokens(part) for part in (query, key, value))
    weights = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).transpose(-1, -2)
    expected = in_map(weights / weights.sum(-1, keepdim=True) @ v)
    torch.testing.assert_close(mixing(x, query, key, value), expected, atol=1e-5, rtol=1e-4)


def test_linear_attention_adds_to_what_queries_and_keys_are_made_of():
    x = maps()[0]
    mixing = LinearMixing(CHANNELS, HEADS)
    assert all(torch.equal(part, x) for part in mixing.inputs(x))
    for_query, for_key = stirred(mixing).inputs(x)
    assert not torch.allclose(for_query, x) and not torch.allclose(for_query, for_key)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, Window(12), 40, None])
def test_window_attention_sees_a_disc(chunk):
    x, query, key, value = maps()
    q, k, v = (in_tokens(part) for part in (query, key, value))
    place = torch.cartesian_prod(torch.arange(HEIGHT), torch.arange(WIDTH)).float()
    side = chunk.side if isinstance(chunk, Window) else chunk
    mask = torch.cdist(place, place) < (1e9 if side is None else side / 2)
    expected = in_map(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    torch.testing.assert_close(WindowMixing(CHANNELS, HEADS)(x, query, key, value, chunk), expected)
