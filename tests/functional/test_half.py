"""Frozen matrices in bfloat16: which products change, and by how much."""

import pickle

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fewshot_nlp.functional.half import HalfFrozen

RNG = torch.Generator().manual_seed(0)
X = torch.randn(5, 16, generator=RNG)


def frozen(bias=True):
    torch.manual_seed(0)
    return nn.Linear(16, 8, bias=bias).requires_grad_(False)


def test_a_frozen_layer_computes_in_bfloat16_and_answers_as_it_was_asked():
    for layer in (frozen(), frozen(bias=False)):
        with HalfFrozen():
            found = layer(X)
        bias = None if layer.bias is None else layer.bias.bfloat16()
        assert torch.equal(found, functional.linear(X.bfloat16(), layer.weight.bfloat16(), bias).float())
        assert not torch.equal(found, layer(X))
        torch.testing.assert_close(found, layer(X), rtol=0.02, atol=0.02)


def test_gpt2_multiplies_in_another_way():
    torch.manual_seed(0)
    layer = Conv1D(8, 16).requires_grad_(False)
    with HalfFrozen():
        found = layer(X)
    expected = torch.addmm(layer.bias.bfloat16(), X.bfloat16(), layer.weight.bfloat16()).float()
    assert torch.equal(found, expected)
    assert not torch.equal(found, layer(X))


def test_what_is_trained_fast_or_of_another_type_stays_exact():
    learned, layer = frozen().requires_grad_(True), frozen()
    fast = {"weight": layer.weight.clone(), "bias": layer.bias.clone()}
    expected = learned(X), functional_call(layer, fast, (X,)), layer.double()(X.double())
    half = HalfFrozen()
    with half:
        found = learned(X), functional_call(layer, fast, (X,)), layer(X.double())
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert not half._kept


def test_a_trained_bias_of_a_frozen_weight_is_trained():
    layer, half = frozen(), HalfFrozen()
    layer.bias.requires_grad_(True)
    fast = layer.bias.detach().clone().requires_grad_()
    with half:
        layer(X).sum().backward()
        functional_call(layer, {"bias": fast}, (X,)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 5.0))
    torch.testing.assert_close(fast.grad, torch.full((8,), 5.0))
    assert list(half._kept) == [id(layer.weight)]


def test_nothing_that_is_kept_is_pickled():
    layer, half = frozen(), HalfFrozen()
    with half:
        layer(X)
    assert not pickle.loads(pickle.dumps(half))._kept


def test_two_derivatives_pass_through():
    layer, x = frozen(), X.clone().requires_grad_()

    def second():
        grad = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(grad.square().sum(), x)[0]

    with HalfFrozen():
        found = second()
    torch.testing.assert_close(found, second(), rtol=0.1, atol=0.03)
    assert layer.weight.grad is None


def test_a_weight_is_converted_once_and_again_when_it_was_written_to():
    layer, half = frozen(), HalfFrozen()
    with half:
        layer(X)
        first = half._kept[id(layer.weight)][3]
        layer(X)
        assert half._kept[id(layer.weight)][3] is first
        with torch.no_grad():
            layer.weight.zero_()
        assert torch.equal(layer(X), layer.bias.bfloat16().float().expand(5, 8))
        layer.weight.data = torch.ones(8, 16)
        assert torch.equal(
            layer(X), functional.linear(X.bfloat16(), torch.ones(8, 16).bfloat16(), layer.bias.bfloat16()).float()
        )
