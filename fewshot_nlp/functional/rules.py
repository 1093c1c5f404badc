"""Update rules for the inner loop: ``init`` / ``update`` pairs that compose with ``chain``.

The shape is optax's: a rule turns gradients into updates that are added to the parameters. Everything is a
differentiable function of the gradients, so that a meta-gradient can flow through the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Updates = dict[str, Tensor]


class Rule(NamedTuple):
    """``init(params) -> state`` and ``update(grads, state, params) -> (updates, state)``."""

    init: Callable[[Mapping[str, Tensor]], Any]
    update: Callable[[Updates, Any, Mapping[str, Tensor]], tuple[Updates, Any]]


def stateless(transform: Callable[[Updates, Mapping[str, Tensor]], Updates]) -> Rule:
    """A rule without memory, from ``transform(grads, params) -> updates``."""
    return Rule(lambda params: (), lambda grads, state, params: (transform(grads, params), state))


def chain(*rules: Rule) -> Rule:
    """Apply rules one after another."""

    def update(grads: Updates, state: Any, params: Mapping[str, Tensor]) -> tuple[Updates, Any]:
        states = []
        for rule, old in zip(rules, state, strict=True):
            grads, new = rule.update(grads, old, params)
            states.append(new)
        return grads, tuple(states)

    return Rule(lambda params: tuple(rule.init(params) for rule in rules), update)


def scale(factors: Mapping[str, float]) -> Rule:
    """Multiply each gradient by the factor whose key its name starts with, such as ``{"model.": -0.1}``."""

    def factor(name: str) -> float:
        for prefix, value in factors.items():
            if name.startswith(prefix):
                return value
        raise KeyError(f"No step size for {name!r}: factors are given for {', '.join(factors)}.")

    return stateless(lambda grads, params: {name: factor(name) * grad for name, grad in grads.items()})


def clip_by_global_norm(max_norm: float) -> Rule:
    """Scale all gradients down together so that their joint Euclidean norm is at most ``max_norm``."""

    def transform(grads: Updates, params: Mapping[str, Tensor]) -> Updates:
        norm = torch.sqrt(sum((grad.square().sum() for grad in grads.values()), torch.tensor(1e-24)))
        ratio = torch.clamp(max_norm / norm, max=1.0)
        return {name: grad * ratio for name, grad in grads.items()}

    return stateless(transform)


def add_decayed_weights(weight_decay: float) -> Rule:
    """Add ``weight_decay`` times the parameter to its gradient."""
    return stateless(lambda grads, params: {name: g + weight_decay * params[name] for name, g in grads.items()})


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 1e-16) -> Rule:
    """Adam's direction (Kingma and Ba 2015). ``eps_root`` keeps the derivative of the root finite at zero."""

    def init(params: Mapping[str, Tensor]) -> tuple[int, Updates, Updates]:
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        return 0, zeros, dict(zeros)

    def update(grads: Updates, state: Any, params: Mapping[str, Tensor]) -> tuple[Updates, Any]:
        count, first, second = state
        count += 1
        first = {name: b1 * first[name] + (1 - b1) * grad for name, grad in grads.items()}
        second = {name: b2 * second[name] + (1 - b2) * grad.square() for name, grad in grads.items()}
        debias1, debias2 = 1 - b1**count, 1 - b2**count
        updates = {
            name: (first[name] / debias1) / (torch.sqrt(second[name] / debias2 + eps_root) + eps) for name in grads
        }
        return updates, (count, first, second)

    return Rule(init, update)


def sgd(learning_rates: Mapping[str, float]) -> Rule:
    """Gradient descent; step sizes by name prefix."""
    return scale({prefix: -rate for prefix, rate in learning_rates.items()})


def adam(learning_rates: Mapping[str, float]) -> Rule:
    """Adam; step sizes by name prefix."""
    return chain(scale_by_adam(), sgd(learning_rates))


RULES: dict[str, Callable[[Mapping[str, float]], Rule]] = {"sgd": sgd, "adam": adam}
