"""Calling a module with other parameters, strictly."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fewshot_nlp.functional.call import call, check_names, inputs_of, run, trainable


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.shift = nn.Parameter(torch.ones(2))
        self.inner.bias.requires_grad_(False)

    def forward(self, x, double=False):
        return (2 if double else 1) * (self.inner(x) + self.shift)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Affine()


X = torch.tensor([[1.0, 2.0]])


def test_trainable_names_in_the_modules_order(module):
    assert trainable(module) == ("shift", "inner.weight")
    assert trainable(module.requires_grad_(False)) == ()


def test_given_parameters_are_used_and_the_others_stay(module):
    params = {"inner.weight": torch.eye(2), "shift": torch.tensor([10.0, 20.0])}
    expected = 2 * (X + module.inner.bias + params["shift"])
    torch.testing.assert_close(call(module, trainable(module), params, x=X, double=True), expected)


def test_the_module_is_left_as_it_was(module):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    call(module, trainable(module), {"inner.weight": torch.eye(2), "shift": torch.zeros(2)}, x=X)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_gradients_reach_what_was_given_and_nothing_else(module):
    params = {"inner.weight": torch.eye(2).requires_grad_(), "shift": torch.zeros(2).requires_grad_()}
    call(module, trainable(module), params, x=X).sum().backward()
    torch.testing.assert_close(params["inner.weight"].grad, X.repeat(2, 1))
    torch.testing.assert_close(params["shift"].grad, torch.ones(2))
    assert all(value.grad is None for value in module.parameters())


def test_a_parameter_of_two_names_is_replaced_under_both():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    module = Tied()
    assert trainable(module) == ("first.weight",)
    for factor in (2.0, 3.0):
        found = call(module, trainable(module), {"first.weight": factor * torch.eye(2)}, x=X)
        torch.testing.assert_close(found, factor**2 * X)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"shift": torch.zeros(2)}, r"missing \['inner.weight'\]"),
        ({}, r"missing \['inner.weight', 'shift'\]"),
        ({"shift": X, "inner.weight": X, "inner.wieght": X}, r"unknown \['inner.wieght'\], missing \[\]"),
        ({"shift": X, "inner.weight": X, "inner.bias": X}, r"unknown \['inner.bias'\]"),
    ],
)
def test_wrong_names_raise(module, params, message):
    with pytest.raises(KeyError, match=message):
        call(module, trainable(module), params, x=X)
    with pytest.raises(KeyError, match=message):
        check_names(params, frozenset(trainable(module)))


def test_right_names_pass():
    check_names({"b": X, "a": X}, {"a", "b"})


def test_a_function_runs_under_other_parameters(module):
    """Also parts of the module that it calls by themselves; afterwards the module has its own again."""
    params = {"shift": torch.full((2,), 3.0), "inner.weight": torch.zeros(2, 2)}
    names = trainable(module)
    expected = call(module, names, params, x=X)
    assert torch.equal(run(module, names, params, lambda: module(X)), expected)
    assert torch.equal(run(module, names, params, lambda: module.inner(X))[0], module.inner.bias)
    assert not torch.equal(module(X), expected)
    with pytest.raises(KeyError, match="missing"):
        run(module, names, {}, lambda: module(X))


def test_a_pass_ends_before_a_layer(module):
    reached = []
    double = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    double[2].register_forward_hook(lambda *_: reached.append(True))
    (found,) = inputs_of(double[2], lambda: double(X))
    torch.testing.assert_close(found, torch.tanh(double[0](X)))
    assert not reached and not double[2]._forward_pre_hooks
    with pytest.raises(RuntimeError, match="does not reach Linear"):
        inputs_of(nn.Linear(1, 1), lambda: double(X))


@pytest.mark.parametrize("through", [call, run])
def test_no_weight_outlives_its_call_under_autocast(module, through):
    """Autocast would keep each leaf, and what it cast it to, until its block ends: an inner loop makes new ones."""
    with torch.autocast("cpu", torch.bfloat16):
        params = {name: torch.ones_like(module.get_parameter(name), requires_grad=True) for name in trainable(module)}
        seen = weakref.ref(params["inner.weight"])
        if through is call:
            call(module, trainable(module), params, x=X)
        else:
            run(module, trainable(module), params, lambda: module(X))
        del params
        gc.collect()
        assert seen() is None and torch.is_autocast_cache_enabled()
