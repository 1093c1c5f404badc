"""Attention in plain operations against torch's fused one."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fewshot_nlp.functional.attention import attention

SCALING = 0.3


def random_parts(key_heads=4, queries=3, keys=5, batch=2, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(batch, 4, queries, 6), (batch, key_heads, keys, 6), (batch, key_heads, keys, 6)]
    return [torch.randn(shape, generator=rng, dtype=dtype) for shape in shapes]


def random_mask(queries=3, keys=5, batch=2):
    """Every query sees its first key, and about half of the others."""
    seen = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(9)) < 0.5
    seen[..., 0] = True
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_values_are_torchs(key_heads, masked):
    query, key, value = random_parts(key_heads)
    mask = random_mask() if masked else None
    found, weights = attention(query, key, value, mask, SCALING)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALING, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert found.shape == (2, 3, 4, 6) and found.is_contiguous()
    assert weights.shape == (2, 4, 3, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3, dtype=torch.float64))
    if masked:
        assert (weights[mask.expand_as(weights) < 0] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_torchs(masked):
    parts = [part.requires_grad_() for part in random_parts(2)]
    mask = random_mask() if masked else None
    weight = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad((attention(*parts, mask, SCALING)[0] * weight).sum(), parts)
    fused = scaled_dot_product_attention(*parts, attn_mask=mask, scale=SCALING, enable_gqa=True)
    expected = torch.autograd.grad((fused.transpose(1, 2) * weight).sum(), parts)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other)


@pytest.mark.parametrize("key_heads", [4, 1])
def test_first_and_second_derivatives(key_heads):
    parts = [part.requires_grad_() for part in random_parts(key_heads, queries=2, keys=3, batch=1)]
    mask = random_mask(queries=2, keys=3, batch=1)

    def output(*parts):
        return attention(*parts, mask, SCALING)[0]

    assert torch.autograd.gradcheck(output, parts)
    assert torch.autograd.gradgradcheck(output, parts)


def test_vmap_is_a_loop():
    parts = [torch.stack(pair) for pair in zip(random_parts(2, seed=1), random_parts(2, seed=2), strict=True)]
    mask = random_mask()
    found = torch.vmap(lambda *each: attention(*each, mask, SCALING)[0])(*parts)
    loop = [attention(*(part[i] for part in parts), mask, SCALING)[0] for i in range(2)]
    torch.testing.assert_close(found, torch.stack(loop))


def test_a_mask_longer_than_the_keys_is_cut():
    query, key, value = random_parts()
    mask = random_mask()
    longer = torch.cat([mask, torch.zeros(2, 1, 3, 4, dtype=torch.float64)], dim=-1)
    assert torch.equal(attention(query, key, value, longer, SCALING)[0], attention(query, key, value, mask, SCALING)[0])


def test_weights_of_half_precision_are_summed_in_float32():
    """2,048 equal bfloat16 weights: added up in bfloat16, which has 8 bits, they would not reach 1."""
    query, key, value = (part.bfloat16() for part in random_parts(keys=2048))
    found, weights = attention(torch.zeros_like(query), key, torch.ones_like(value), None, SCALING)
    assert found.dtype == weights.dtype == torch.bfloat16
    assert weights.float().sum(-1).sub(1).abs().max() < 1e-3


def test_dropout_drops_and_rescales():
    query, key, value = random_parts(keys=500)
    torch.manual_seed(0)
    _, kept = attention(query, key, value, None, SCALING, dropout=0.5)
    _, plain = attention(query, key, value, None, SCALING)
    dropped = kept == 0
    assert 0.4 < dropped.double().mean() < 0.6
    torch.testing.assert_close(kept[~dropped], 2 * plain[~dropped])
