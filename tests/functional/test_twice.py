"""GELU and layer norm in closed form: as torch's own, and their second derivatives checked by finite differences."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.function import BackwardCFunction
from torch.nn import functional

from fewshot_nlp.functional.twice import ClosedForms

torch.manual_seed(0)
WEIGHT, BIAS = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
WIDE = nn.LayerNorm((4, 6), elementwise_affine=True).double().requires_grad_(False)
FUNCTIONS = {
    "gelu": functional.gelu,
    "layer norm": lambda x: functional.layer_norm(x, (6,), WEIGHT, BIAS, 1e-5),
    "without a bias": lambda x: functional.layer_norm(x, [6], weight=WEIGHT),
    "over two axes": WIDE,
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


def example(dtype=torch.float64):
    return torch.randn(3, 4, 6, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def within(function):
    def call(x):
        with ClosedForms():
            return function(x)

    return call


def test_values_and_first_derivatives_are_torchs_to_the_bit(function):
    x = example()
    found, expected = within(function)(x), function(x)
    # Torch's own nodes are not Python's.
    assert isinstance(found.grad_fn, BackwardCFunction) and not isinstance(expected.grad_fn, BackwardCFunction)
    assert torch.equal(found, expected)
    pull = torch.randn_like(expected)
    slopes = [torch.autograd.grad(output, x, pull)[0] for output in (found, expected)]
    assert torch.equal(*slopes)


def test_second_derivatives_by_finite_differences(function):
    x = example()
    assert gradcheck(within(function), (x,)) and gradgradcheck(within(function), (x,))


def test_second_derivatives_are_torchs(function):
    found = []
    for call in (function, within(function)):
        x, pull = example(), torch.ones(3, 4, 6, dtype=torch.float64).cumsum(0).requires_grad_()
        (slope,) = torch.autograd.grad(call(x), x, pull, create_graph=True)
        found.append(torch.autograd.grad(slope, [x, pull], x.detach()))
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)


def test_third_derivatives_by_finite_differences(function):
    def slope(x):
        return torch.autograd.grad(within(function)(x).square().sum(), x, create_graph=True)[0]

    assert gradgradcheck(slope, (example(),))


def test_weights_that_are_trained_are_torchs_business():
    layer, x = nn.LayerNorm(6).double(), example()
    found = within(layer)(x)
    assert type(found.grad_fn).__name__ == "NativeLayerNormBackward0"
    weight = torch.autograd.grad(found.sum(), layer.weight)[0]
    torch.testing.assert_close(weight, functional.layer_norm(x, (6,)).sum((0, 1)).detach())


def test_the_other_form_of_gelu_is_torchs_own():
    x = example()
    with ClosedForms():
        found = functional.gelu(x, approximate="tanh")
    assert torch.equal(found, functional.gelu(x, approximate="tanh"))
    assert type(found.grad_fn).__name__ == "GeluBackward0"


def test_without_a_gradient_and_under_autocast_nothing_is_replaced(function):
    x = example(torch.float32)
    with torch.no_grad(), ClosedForms():
        assert function(x.double()).grad_fn is None
    with torch.autocast("cpu", dtype=torch.bfloat16), ClosedForms():
        assert type(functional.gelu(x).grad_fn).__name__ == "GeluBackward0"


def test_a_second_derivative_for_many_vectors_at_once(function):
    x = example()
    (slope,) = torch.autograd.grad(within(function)(x).square().sum(), x, create_graph=True)
    vectors = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    (found,) = torch.autograd.grad(slope, x, vectors, is_grads_batched=True, retain_graph=True)
    for one, vector in zip(found, vectors, strict=True):
        (expected,) = torch.autograd.grad(slope, x, vector, retain_graph=True)
        torch.testing.assert_close(one, expected)


def test_under_vmap(function):
    x = example()
    torch.testing.assert_close(torch.vmap(within(function))(x), torch.stack([function(row) for row in x]))
