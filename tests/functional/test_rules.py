"""Update rules against torch's own optimisers, and their derivatives."""

import pytest
import torch

from fewshot_nlp.functional.rules import (
    RULES,
    Point,
    Rule,
    adam,
    add_decayed_weights,
    build_rule,
    chain,
    clip_by_global_norm,
    momentum,
    scale,
    scale_by_adam,
    scale_by_learned_rates,
    scale_by_step_rates,
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
        updates, state = rule.update(gradients(params, step), state, Point(params, step))
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
    "momentum": (momentum(RATES, 0.8), {"optimiser": torch.optim.SGD, "momentum": 0.8}),
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
    updates, state = rule.update({"x": first}, rule.init(params), Point(params, 0))
    torch.testing.assert_close(updates["x"], torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    second = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    updates, state = rule.update({"x": second}, state, Point(params, 1))
    mean, square = 0.9 * 0.1 * first + 0.1 * second, 0.999 * 0.001 * first**2 + 0.001 * second**2
    expected = (mean / (1 - 0.9**2)) / ((square / (1 - 0.999**2)).sqrt() + 1e-8)
    torch.testing.assert_close(updates["x"], expected)
    torch.testing.assert_close(state, {"first.x": mean, "second.x": square})


@pytest.mark.parametrize("name", [*RULES, "clipped"])
def test_first_and_second_derivatives(name):
    rule = chain(clip_by_global_norm(0.5), sgd({"": 0.1})) if name == "clipped" else RULES[name]({"": 0.1}, 2)
    start = torch.tensor([0.7, -0.4, 1.2], dtype=torch.float64, requires_grad=True)

    def after_two_steps(x):
        params, state = {"x": x}, rule.init({"x": x})
        learned = rule.learned(params)
        for step in range(2):
            point = Point(params, step, learned)
            updates, state = rule.update({"x": torch.sin(params["x"]) * params["x"].sum()}, state, point)
            params = {"x": params["x"] + updates["x"]}
        return params["x"]

    assert torch.autograd.gradcheck(after_two_steps, start)
    assert torch.autograd.gradgradcheck(after_two_steps, start)


@pytest.mark.parametrize("rule", [adam({"": 0.1}), clip_by_global_norm(1.0)], ids=["adam", "clip"])
def test_the_derivative_is_finite_where_the_gradient_is_zero(rule):
    grad = torch.zeros(3, requires_grad=True)
    updates, _ = rule.update({"x": grad}, rule.init({"x": grad}), Point({"x": grad}))
    assert (updates["x"] == 0).all()
    (slope,) = torch.autograd.grad(updates["x"].sum(), grad)
    assert slope.isfinite().all()


def test_clip_leaves_small_gradients_alone():
    grads = gradients(random_params(), 0)
    norm = torch.sqrt(sum(grad.square().sum() for grad in grads.values()))
    for limit, ratio in ((norm * 2, 1.0), (norm / 4, 0.25)):
        clipped, _ = clip_by_global_norm(float(limit)).update(grads, {}, Point(grads))
        for name, grad in grads.items():
            torch.testing.assert_close(clipped[name], ratio * grad)


def test_chain_goes_from_left_to_right_and_keeps_each_state():
    def counting(factor):
        def update(grads, slots, point):
            return {name: factor * grad + slots["n"] for name, grad in grads.items()}, {"n": slots["n"] + 1}

        return Rule(lambda fast: {"n": 0}, update)

    rule = chain(counting(2), counting(10), stateless(lambda grads, point: {"x": grads["x"] - point.fast["x"]}))
    params = {"x": torch.tensor(100.0)}
    state = rule.init(params)
    assert state == {"0.n": 0, "1.n": 0}
    updates, state = rule.update({"x": torch.tensor(1.0)}, state, Point(params))
    assert updates["x"] == 1 * 2 * 10 - 100
    assert state == {"0.n": 1, "1.n": 1}
    updates, state = rule.update({"x": torch.tensor(1.0)}, state, Point(params))
    assert updates["x"] == (1 * 2 + 1) * 10 + 1 - 100


def test_scale_goes_by_the_first_prefix_that_fits():
    rule = scale({"model.a": 2.0, "model.": 3.0})
    one = torch.ones(())
    updates, _ = rule.update({"model.a.weight": one, "model.b": one}, {}, Point({}))
    assert updates == {"model.a.weight": 2.0, "model.b": 3.0}


def test_a_name_without_a_step_size_raises():
    with pytest.raises(KeyError, match=r"No step size for 'rule\.x': factors are given for model\., head\."):
        scale({"model.": 1.0, "head.": 1.0}).update({"rule.x": torch.ones(1)}, {}, Point({}))


def test_learned_rates_start_as_plain_descent_and_have_the_shape_of_the_weights():
    params = random_params()
    rule = scale_by_learned_rates(RATES)
    learned = rule.learned(params)
    assert {name: tuple(value.shape) for name, value in learned.items()} == {
        "rule.rate.model.a": (3, 2),
        "rule.rate.head.b": (4,),
    }
    assert rule.learned({"head.b": torch.zeros(())})["rule.rate.head.b"].shape == ()
    grads = gradients(params, 0)
    found, _ = rule.update(grads, {}, Point(params, 0, learned))
    expected, _ = sgd(RATES).update(grads, {}, Point(params))
    torch.testing.assert_close(found, expected)
    moved, _ = rule.update(grads, {}, Point(params, 0, {n: 2 * v for n, v in learned.items()}))
    torch.testing.assert_close(moved, {name: 2 * value for name, value in expected.items()})


def test_rates_by_step():
    """One a step; a task that takes more steps than were learned goes on with the last."""
    params = random_params()
    rule = scale_by_step_rates(RATES, 3)
    assert {name: tuple(v.shape) for name, v in rule.learned(params).items()} == {
        "rule.rate.model.a": (3,),
        "rule.rate.head.b": (3,),
    }
    rates = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    learned = dict.fromkeys(rule.learned(params), rates)
    grads = gradients(params, 0)
    for step, rate in enumerate([0.1, 0.2, 0.4, 0.4]):
        found, _ = rule.update(grads, {}, Point(params, step, learned))
        torch.testing.assert_close(found, {name: -rate * grad for name, grad in grads.items()})


def test_a_built_rule_clips_then_decays_then_steps():
    params = random_params()
    grads = {name: 100 * grad for name, grad in gradients(params, 0).items()}
    rule = build_rule("sgd", RATES, steps=1, weight_decay=0.3, max_grad_norm=0.7)
    found, _ = rule.update(grads, rule.init(params), Point(params))
    norm = torch.sqrt(sum(grad.square().sum() for grad in grads.values()))
    for prefix, name in (("model.", "model.a"), ("head.", "head.b")):
        expected = -RATES[prefix] * (0.7 * grads[name] / norm + 0.3 * params[name])
        torch.testing.assert_close(found[name], expected)


def test_what_rests_stays_where_it_is_at_a_gradient_of_zero():
    """Whatever the meta-parameters: neither the step nor its derivatives are anything but zero."""
    fast = {"w": torch.tensor([1.0, -2.0]).double().requires_grad_()}
    for name in RULES:
        rule = build_rule(name, {"": 0.1}, steps=2, max_grad_norm=0.5)
        assert rule.rests
        theta = {**fast, **{n: v.requires_grad_() for n, v in rule.learned(fast).items()}}
        updates, _ = rule.update({"w": torch.zeros_like(fast["w"])}, rule.init(fast), Point(fast, 0, theta))
        assert not updates["w"].any()
        if updates["w"].requires_grad:
            found = torch.autograd.grad(updates["w"].sum(), [*theta.values()], materialize_grads=True)
            assert not any(grad.any() for grad in found)
        assert not build_rule(name, {"": 0.1}, steps=2, weight_decay=0.1).rests
    assert not stateless(lambda grads, point: grads).rests, "nothing is known of a rule from outside"
