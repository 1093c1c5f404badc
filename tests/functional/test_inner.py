"""The inner loop on a quadratic, where everything has a closed form."""

import pytest
import torch

from fewshot_nlp.functional.inner import inner_loop
from fewshot_nlp.functional.rules import adam, sgd

#: f(x) = (x - b)' A (x - b) / 2, whose gradient is A (x - b).
A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
B = torch.tensor([1.0, -1.0], dtype=torch.float64)
RATE = 0.3


def start():
    return torch.tensor([3.0, 2.0], dtype=torch.float64, requires_grad=True)


def slope(fast, step):
    return {"model.x": A @ (fast["model.x"] - B)}


def shrink(steps):
    """``x_K - b = (I - αA)^K (x_0 - b)``."""
    return torch.linalg.matrix_power(torch.eye(2, dtype=torch.float64) - RATE * A, steps)


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_gradient_descent_has_its_closed_form(steps):
    x = start()
    found = inner_loop(slope, {"model.x": x}, sgd({"model.": RATE}), steps)["model.x"]
    torch.testing.assert_close(found, B + shrink(steps) @ (x - B))


@pytest.mark.parametrize("steps", [1, 4])
def test_the_exact_derivative_goes_through_every_step(steps):
    x = start()
    found = inner_loop(slope, {"model.x": x}, sgd({"model.": RATE}), steps)["model.x"]
    target = torch.tensor([1.0, 2.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(found @ target, x)
    torch.testing.assert_close(grad, shrink(steps).T @ target)


def test_detached_gradients_make_it_first_order():
    x = start()

    def constant(fast, step):
        return {name: value.detach() for name, value in slope(fast, step).items()}

    found = inner_loop(constant, {"model.x": x}, sgd({"model.": RATE}), 4)["model.x"]
    (jacobian,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(jacobian, torch.ones_like(x))
    torch.testing.assert_close(found, B + shrink(4) @ (x - B))


def test_the_gradient_is_told_the_step():
    steps = []

    def note(fast, step):
        steps.append(step)
        return slope(fast, step)

    inner_loop(note, {"model.x": start()}, sgd({"model.": RATE}), 3)
    assert steps == [0, 1, 2]


def test_the_start_is_not_written_to():
    x = start()
    given = {"model.x": x}
    inner_loop(slope, given, adam({"model.": RATE}), 3)
    assert given["model.x"] is x
    assert torch.equal(x, start())


def test_adams_memory_lives_as_long_as_the_loop():
    """Two loops of one step are not one loop of two steps."""
    rule = adam({"model.": RATE})
    two = inner_loop(slope, {"model.x": start()}, rule, 2)
    one = inner_loop(slope, {"model.x": start()}, rule, 1)
    again = inner_loop(slope, one, rule, 1)
    assert (two["model.x"] - again["model.x"]).abs().max() > 1e-3
