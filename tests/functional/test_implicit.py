"""Implicit differentiation where the inner problem is solved by a formula."""

from __future__ import annotations

import pytest
import torch

from fewshot_nlp.functional.implicit import conjugate_gradient, implicit_gradient

A = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, -0.2], [0.1, -0.2, 3.0]], dtype=torch.float64)
B = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
LAMBDA = 0.7


def params():
    return {
        "x": torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64),
        "scale": torch.tensor(1.3, dtype=torch.float64),
        "shift": torch.tensor(0.4, dtype=torch.float64),
    }


def solved(theta):
    """φ* of ``s (φ - b)' A (φ - b) / 2 + λ/2 |φ - 2x|²``, where the start is 2x."""
    scaled = theta["scale"] * A
    return torch.linalg.solve(scaled + LAMBDA * torch.eye(3).double(), scaled @ B + LAMBDA * 2 * theta["x"])


def query(theta, phi):
    return ((phi["y"] - theta["shift"]) ** 3).sum(), phi["y"] * 2


def implicit(**options):
    return implicit_gradient(
        lambda theta: {"y": 2 * theta["x"]},
        lambda theta, phi: {"y": theta["scale"] * A @ (phi["y"] - B)},
        query,
        params(),
        {"y": solved(params())},
        moving=["y"],
        proximal=LAMBDA,
        **options,
    )


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_it_is_the_derivative_of_the_solution(mode):
    theta = {name: value.requires_grad_() for name, value in params().items()}
    query(theta, {"y": solved(theta)})[0].backward()
    with mode():
        found = implicit(steps=3)
    for name, value in theta.items():
        torch.testing.assert_close(found.grads[name], value.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.loss, query(params(), {"y": solved(params())})[0])
    torch.testing.assert_close(found.extra, 2 * solved(params()))


def test_what_the_loop_leaves_at_its_start_is_seen_through_the_start():
    def still(theta):
        return theta["shift"] * theta["x"]

    def solved_beside(theta):
        scaled = theta["scale"] * A
        right = scaled @ B - still(theta) + LAMBDA * 2 * theta["x"]
        return torch.linalg.solve(scaled + LAMBDA * torch.eye(3).double(), right)

    def loss(theta, fast):
        value, extra = query(theta, fast)
        return value + (fast["z"] * fast["y"]).sum(), extra

    theta = {name: value.requires_grad_() for name, value in params().items()}
    loss(theta, {"y": solved_beside(theta), "z": still(theta)})[0].backward()
    found = implicit_gradient(
        lambda theta: {"z": still(theta), "y": 2 * theta["x"]},
        lambda theta, fast: {"z": fast["y"], "y": theta["scale"] * A @ (fast["y"] - B) + fast["z"]},
        loss,
        params(),
        {"z": still(params()), "y": solved_beside(params())},
        moving=["y"],
        proximal=LAMBDA,
        steps=3,
    )
    for name, value in theta.items():
        torch.testing.assert_close(found.grads[name], value.grad, rtol=1e-9, atol=1e-12)


def test_too_few_steps_are_an_approximation():
    exact, rough = implicit(steps=3).grads["x"], implicit(steps=1).grads["x"]
    assert 1e-3 < (exact - rough).norm() / exact.norm() < 0.5


def test_conjugate_gradient_solves_in_as_many_steps_as_dimensions():
    torch.testing.assert_close(conjugate_gradient(lambda v: A @ v, B, 3, 0.0), torch.linalg.solve(A, B))


def test_conjugate_gradient_stops_when_it_is_good_enough():
    calls = []

    def product(vector):
        calls.append(vector)
        return 2 * vector

    torch.testing.assert_close(conjugate_gradient(product, B, 10, 1e-6), B / 2)
    assert len(calls) == 1


def test_conjugate_gradient_stops_at_a_direction_that_is_not_positive():
    found = conjugate_gradient(lambda v: -v, B, 10, 1e-6)
    assert torch.equal(found, torch.zeros_like(B))


def test_nothing_to_solve():
    assert torch.equal(conjugate_gradient(lambda v: A @ v, torch.zeros(3).double(), 5, 1e-9), torch.zeros(3).double())


def test_scalar_products_are_not_rounded_by_autocast():
    """They decide where the search goes next: in half precision it was lost."""
    matrix, vector = A.float(), B.float()

    def solve():
        return conjugate_gradient(lambda direction: (matrix * direction).sum(dim=1), vector, 3, 1e-10)

    with torch.autocast("cpu", torch.bfloat16):
        found = solve()
    assert torch.equal(found, solve())
