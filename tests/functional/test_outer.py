"""The engine on a quadratic, where every gradient has a closed form."""

from __future__ import annotations

import pytest
import torch

from fewshot_nlp.functional.outer import Carry, adapt, gradient, meta_gradient
from fewshot_nlp.functional.rules import RULES, Point, build_rule

#: f(x) = (x - b)' A (x - b) / 2, whose gradient is A (x - b).
A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
B = torch.tensor([1.0, -1.0], dtype=torch.float64)
TARGET = torch.tensor([0.5, 2.0], dtype=torch.float64)
RATE = 0.3


def start():
    return {"model.x": torch.tensor([3.0, 2.0], dtype=torch.float64), "head.scale": torch.tensor(0.7).double()}


def links(steps, rule=None, calls=None, dropout=0.0):
    """Gradient descent on ``s f`` from x, with the scale s a meta-parameter too."""
    rule = rule or build_rule("sgd", {"model.": RATE}, steps=steps)

    def link(k, params, carry, record):
        if calls is not None:
            calls.append((k, record))
        if carry is None:
            fast = {"model.x": params["model.x"]}
            carry = Carry(fast, rule.init(fast))
        x = carry.fast["model.x"]
        slope = {"model.x": params["head.scale"] * A @ (x - B) * (1 + 0.1 * x)}
        if dropout:
            slope = {"model.x": torch.nn.functional.dropout(slope["model.x"], dropout)}
        updates, slots = rule.update(slope, carry.slots, Point(carry.fast, k, params))
        return Carry({"model.x": x + updates["model.x"]}, slots)

    return [lambda params, carry, record, k=k: link(k, params, carry, record) for k in range(steps)]


def loss(params, carry):
    error = carry.fast["model.x"] - TARGET
    return params["head.scale"] * error.square().sum(), error


def unrolled(steps, params, rule=None, weights=None):
    """Torch's own derivative of the whole loop."""
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    carry, total = None, 0.0
    for k, link in enumerate(links(steps, rule)):
        carry = link(leaves, carry, True)
        weight = weights[k] if weights else float(k == steps - 1)
        total = total + weight * loss(leaves, carry)[0]
    total.backward()
    return {name: value.grad for name, value in leaves.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 1e-6, name
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


def test_gradient_descent_has_its_closed_form():
    """``x_K - b = (I - αA)^K (x_0 - b)`` without the factor that bends it."""
    x = torch.tensor([3.0, 2.0], dtype=torch.float64)

    def link(params, carry, record):
        at = params["x"] if carry is None else carry.fast["x"]
        return Carry({"x": at - RATE * A @ (at - B)}, {})

    for steps in (1, 2, 7):
        shrink = torch.linalg.matrix_power(torch.eye(2, dtype=torch.float64) - RATE * A, steps)
        torch.testing.assert_close(adapt([link] * steps, {"x": x}).fast["x"], B + shrink @ (x - B))
        for chunk in (1, 2, None):
            found = meta_gradient(
                [link] * steps, lambda p, carry: (carry.fast["x"] @ TARGET, TARGET), {"x": x}, chunk=chunk
            )
            torch.testing.assert_close(found.grads["x"], shrink.T @ TARGET)
            torch.testing.assert_close(found.loss, (B + shrink @ (x - B)) @ TARGET)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 100, None])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_chunk_is_the_unrolled_loop(name, steps, chunk):
    rule = build_rule(name, {"model.": RATE}, steps=steps, weight_decay=0.1, max_grad_norm=1.5)
    params = start()
    params |= rule.learned({"model.x": params["model.x"]})
    found = meta_gradient(links(steps, rule), loss, params, chunk=chunk)
    expected = unrolled(steps, params, rule)
    assert_same(found.grads, expected)
    carry = adapt(links(steps, rule), params)
    assert torch.equal(found.loss, loss(params, carry)[0])
    assert torch.equal(found.extra, loss(params, carry)[1])


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_losses_after_every_step(chunk):
    """Multi-step loss: Antoniou et al. 2019, section 4."""
    weights = [0.1, 0.0, 0.3, 0.6]
    found = meta_gradient(links(4), loss, start(), chunk=chunk, weights=weights)
    assert_same(found.grads, unrolled(4, start(), weights=weights))
    assert torch.equal(found.loss, loss(start(), adapt(links(4), start()))[0])


@pytest.mark.parametrize(("chunk", "again"), [(1, 3), (2, 2), (3, 1), (4, 0)])
def test_only_what_was_forgotten_is_run_again(chunk, again):
    calls = []
    meta_gradient(links(4, calls=calls), loss, start(), chunk=chunk)
    assert len(calls) == 4 + again
    assert sorted(k for k, record in calls if record) == [0, 1, 2, 3]


def test_random_numbers_are_drawn_again():
    """Dropout inside the loop: the same mask in both passes, whatever the chunk, and another one with another seed."""
    outcomes = [meta_gradient(links(4, dropout=0.5), loss, start(), chunk=c, seed=3) for c in (1, 2, None)]
    for outcome in outcomes[1:]:
        assert torch.equal(outcome.loss, outcomes[0].loss)
        assert_same(outcome.grads, outcomes[0].grads)
    others = [meta_gradient(links(4, dropout=0.5), loss, start(), seed=seed).loss for seed in range(4)]
    assert len({float(other) for other in others}) > 1


def test_generators_are_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    meta_gradient(links(3, dropout=0.5), loss, start(), chunk=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_grad_mode(mode):
    expected = unrolled(3, start())
    with mode():
        params = start()
        found = meta_gradient(links(3), loss, params, chunk=1)
    assert_same(found.grads, expected)


def test_nothing_given_is_written_to():
    params = start()
    meta_gradient(links(3), loss, params, chunk=1)
    adapt(links(3), params)
    for name, value in start().items():
        assert torch.equal(params[name], value) and not params[name].requires_grad


def test_what_no_link_reads_has_no_gradient():
    params = {**start(), "head.unused": torch.ones(2, dtype=torch.float64)}
    for chunk in (1, None):
        assert torch.equal(
            meta_gradient(links(3), loss, params, chunk=chunk).grads["head.unused"], torch.zeros(2).double()
        )


def test_the_backward_pass_is_not_rounded_by_autocast():
    """What a forward pass left in full precision would be a product of halves there."""
    x, weight = torch.linspace(-1, 1, 6).view(2, 3), torch.linspace(1, 2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            loss = (x @ weight).exp().sum()
        (found,) = gradient(loss, [weight])
    (expected,) = torch.autograd.grad((x @ weight).exp().sum(), weight)
    assert torch.equal(found, expected)
