"""GELU and layer norm with cheap second derivatives, beside torch's own."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from fewshot_nlp.functional import smooth
from fewshot_nlp.functional.smooth import TwiceDifferentiable

RNG = torch.Generator().manual_seed(0)
X = torch.randn(3, 5, 7, generator=RNG, dtype=torch.float64)
WEIGHT, BIAS = torch.randn(2, 7, generator=RNG, dtype=torch.float64)
FUNCTIONS = {
    "gelu": functional.gelu,
    "gelu, tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "layer norm": lambda x: functional.layer_norm(x, (7,), WEIGHT, BIAS, 1e-2),
    "layer norm without bias": lambda x: functional.layer_norm(x, (7,), WEIGHT),
    "layer norm without weight": lambda x: functional.layer_norm(x, (7,)),
    "layer norm over two dimensions": lambda x: functional.layer_norm(x, (5, 7), WEIGHT.expand(5, 7)),
    "layer norm of what is not contiguous": lambda x: functional.layer_norm(x.transpose(0, 1), (7,), WEIGHT),
}
OURS = {"gelu": "_Gelu", "layer norm": "_LayerNorm"}


def ours(function):
    def call(x):
        with TwiceDifferentiable():
            return function(x)

    return call


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_right(name):
    x = X.clone().requires_grad_()
    assert gradcheck(ours(FUNCTIONS[name]), (x,))
    assert gradgradcheck(ours(FUNCTIONS[name]), (x,))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_they_are_torchs_own(name, dtype, tolerance, monkeypatch):
    def derivatives(function):
        x = (3 * X).to(dtype).requires_grad_()
        out = function(x)
        grad = torch.autograd.grad(out, x, out.detach().sin(), create_graph=True)[0]
        return out.detach(), grad.detach(), torch.autograd.grad(grad, x, out.detach().cos().view_as(x))[0]

    for attribute in ("WEIGHT", "BIAS"):
        monkeypatch.setitem(globals(), attribute, globals()[attribute].to(dtype))
    for found, expected in zip(derivatives(ours(FUNCTIONS[name])), derivatives(FUNCTIONS[name]), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OURS)
def test_the_kernels_are_in_use_inside_the_block_alone(name):
    x = X.clone().requires_grad_()
    assert OURS[name] in type(ours(FUNCTIONS[name])(x).grad_fn).__name__
    assert OURS[name] not in type(FUNCTIONS[name](x).grad_fn).__name__


def test_modules_use_them_and_learned_norms_do_not():
    with TwiceDifferentiable():
        assert "_Gelu" in type(nn.GELU()(X.clone().requires_grad_()).grad_fn).__name__
        norm = nn.LayerNorm(7, dtype=torch.float64)
        assert "_LayerNorm" not in type(norm(X.clone().requires_grad_()).grad_fn).__name__
        norm.requires_grad_(False)
        assert "_LayerNorm" in type(norm(X.clone().requires_grad_()).grad_fn).__name__


def test_a_third_derivative_is_an_error_and_no_wrong_number():
    x = X.clone().requires_grad_()
    first = torch.autograd.grad(ours(functional.gelu)(x).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="two derivatives and no third"):
        torch.autograd.grad(first.sum(), x, create_graph=True)


def test_far_from_zero_nothing_overflows():
    x = torch.tensor([-300.0, -40.0, 0.0, 40.0, 300.0], requires_grad=True)
    first = torch.autograd.grad(ours(functional.gelu)(x).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(first.detach(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    second = torch.autograd.grad(first.sum(), x)[0]
    torch.testing.assert_close(second, torch.tensor([0.0, 0.0, 2 / (2 * torch.pi) ** 0.5, 0.0, 0.0]))


def test_what_is_replaced_is_what_torch_calls():
    assert set(smooth._KERNELS) == {functional.gelu, functional.layer_norm}
