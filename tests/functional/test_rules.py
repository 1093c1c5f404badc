"""Update rules against torch's own optimisers, and their derivatives."""

import pytest
import torch

from fewshot_nlp.functional.rules import (
    RULES,
    Rule,
    adam,
    add_decayed_weights,
    chain,
    clip_by_global_norm,
    scale,
    scale_by_adam,
    sgd,
    stateless,
)

STEPS = 5


def random_params(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(3, 2, generator=rng, dtype=torch.float64),
        "head.b": torch.randn(4, generator=rng, dtype=torch.float64),
    }


def gradients(params, step):
    """Of any smooth function; here also one that changes with the step."""
    return {name: torch.sin(3 * value) + 0.1 * step * value for name, value in params.items()}


def by_rule(rule, steps=STEPS):
    params = random_params()
    state = rule.init(params)
    for step in range(steps):
        updates, state = rule.update(gradients(params, step), state, params)
        params = {name: value + updates[name] for name, value in params.items()}
    return params


def by_torch(optimiser, steps=STEPS, prepare=None, **settings):
    params = random_params()
    groups = [{"params": [params["model.a"]], "lr": 0.1}, {"params": [params["head.b"]], "lr": 0.02}]
    optimiser = optimiser(groups, **settings)
    for step in range(steps):
        for name, grad in gradients(params, step).items():
            params[name].grad = grad
        if prepare is not None:
            prepare(list(params.values()))
        optimiser.step()
    return params


RATES = {"model.": 0.1, "head.": 0.02}
PAIRS = {
    "sgd": (sgd(RATES), {"optimiser": torch.optim.SGD}),
    "adam": (adam(RATES), {"optimiser": torch.optim.Adam}),
    "adam, other settings": (
        chain(scale_by_adam(0.8, 0.9, 1e-3), sgd(RATES)),
        {"optimiser": torch.optim.Adam, "betas": (0.8, 0.9), "eps": 1e-3},
    ),
    "sgd with weight decay": (
        chain(add_decayed_weights(0.3), sgd(RATES)),
        {"optimiser": torch.optim.SGD, "weight_decay": 0.3},
    ),
    "adam with weight decay": (
        chain(scale_by_adam(), add_decayed_weights(0.3), sgd(RATES)),
        {"optimiser": torch.optim.AdamW, "weight_decay": 0.3},
    ),
    "sgd, clipped": (
        chain(clip_by_global_norm(0.7), sgd(RATES)),
        {"optimiser": torch.optim.SGD, "prepare": lambda p: torch.nn.utils.clip_grad_norm_(p, 0.7)},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_steps_are_torchs(name):
    rule, settings = PAIRS[name]
    found, expected = by_rule(rule), by_torch(**settings)
    for key, value in expected.items():
        assert (value - random_params()[key]).abs().max() > 1e-2
        # torch adds 1e-6 to the norm it clips by.
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


def test_adam_by_hand():
    """Kingma and Ba 2015, algorithm 1: the first step is the sign of the gradient."""
    rule = scale_by_adam()
    params = {"x": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    first = torch.tensor([4.0, -0.5, 0.0], dtype=torch.float64)
    updates, state = rule.update({"x": first}, rule.init(params), params)
    torch.testing.assert_close(updates["x"], torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    second = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    updates, state = rule.update({"x": second}, state, params)
    mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.999 * 0.001 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
    torch.testing.assert_close(updates["x"], mean / (square.sqrt() + 1e-8))
    assert state[0] == 2


@pytest.mark.parametrize("name", [*RULES, "clipped"])
def test_first_and_second_derivatives(name):
    rule = chain(clip_by_global_norm(0.5), sgd({"": 0.1})) if name == "clipped" else RULES[name]({"": 0.1})
    start = torch.tensor([0.7, -0.4, 1.2], dtype=torch.float64, requires_grad=True)

    def after_two_steps(x):
        params, state = {"x": x}, rule.init({"x": x})
        for _ in range(2):
            updates, state = rule.update({"x": torch.sin(params["x"]) * params["x"].sum()}, state, params)
            params = {"x": params["x"] + updates["x"]}
        return params["x"]

    assert torch.autograd.gradcheck(after_two_steps, start)
    assert torch.autograd.gradgradcheck(after_two_steps, start)


@pytest.mark.parametrize("rule", [adam({"": 0.1}), clip_by_global_norm(1.0)], ids=["adam", "clip"])
def test_the_derivative_is_finite_where_the_gradient_is_zero(rule):
    grad = torch.zeros(3, requires_grad=True)
    updates, _ = rule.update({"x": grad}, rule.init({"x": grad}), {"x": grad})
    assert (updates["x"] == 0).all()
    (slope,) = torch.autograd.grad(updates["x"].sum(), grad)
    assert slope.isfinite().all()


def test_clip_leaves_small_gradients_alone():
    grads = gradients(random_params(), 0)
    norm = torch.sqrt(sum(grad.square().sum() for grad in grads.values()))
    for limit, ratio in ((norm * 2, 1.0), (norm / 4, 0.25)):
        clipped, _ = clip_by_global_norm(float(limit)).update(grads, (), grads)
        for name, grad in grads.items():
            torch.testing.assert_close(clipped[name], ratio * grad)


def test_chain_goes_from_left_to_right_and_keeps_each_state():
    def counting(factor):
        def update(grads, state, params):
            return {name: factor * grad + state for name, grad in grads.items()}, state + 1

        return Rule(lambda params: 0, update)

    rule = chain(counting(2), counting(10), stateless(lambda grads, params: {"x": grads["x"] - params["x"]}))
    params = {"x": torch.tensor(100.0)}
    state = rule.init(params)
    assert state == (0, 0, ())
    updates, state = rule.update({"x": torch.tensor(1.0)}, state, params)
    assert updates["x"] == 1 * 2 * 10 - 100
    assert state == (1, 1, ())
    updates, state = rule.update({"x": torch.tensor(1.0)}, state, params)
    assert updates["x"] == (1 * 2 + 1) * 10 + 1 - 100


def test_scale_goes_by_the_first_prefix_that_fits():
    rule = scale({"model.a": 2.0, "model.": 3.0})
    one = torch.ones(())
    updates, _ = rule.update({"model.a.weight": one, "model.b": one}, (), {})
    assert updates == {"model.a.weight": 2.0, "model.b": 3.0}


def test_a_name_without_a_step_size_raises():
    with pytest.raises(KeyError, match=r"No step size for 'rule\.x': factors are given for model\., head\."):
        scale({"model.": 1.0, "head.": 1.0}).update({"rule.x": torch.ones(1)}, (), {})
