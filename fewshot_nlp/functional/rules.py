"""Update rules for the inner loop: ``init`` / ``update`` pairs that compose with ``chain``.

The shape is optax's: a rule turns gradients into updates that are added to the parameters. Everything is a
differentiable function of the gradients, so that a meta-gradient can flow through the rule. A rule's memory is a flat
dict of tensors, so that an engine can keep it, and differentiate with respect to it, beside the fast weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fewshot_nlp.types import Params

Updates = dict[str, Tensor]
Slots = dict[str, Tensor]

#: Owner of what a rule learns, in the names of meta-parameters.
OWNER = "rule."


class Point(NamedTuple):
    """Where an update is taken.

    Attributes:
        fast: the fast weights.
        step: steps taken before.
        params: the meta-parameters; learned rules read their ``rule.`` entries.
        loss: the support loss there, a 0-d tensor; a constant where its gradient is.
    """

    fast: Params
    step: int = 0
    params: Params = MappingProxyType({})
    loss: Tensor | None = None


def nothing(fast: Params) -> dict[str, Tensor]:
    """No tensors: a rule without memory, or without anything to learn."""
    return {}


class Rule(NamedTuple):
    """How gradients become steps.

    Attributes:
        init: ``init(fast) -> slots``: the memory before the first step.
        update: ``update(grads, slots, point) -> (updates, slots)``.
        learned: ``learned(fast) -> params``: start of what is meta-learned, names starting with ``rule.``.
        rests: a first gradient of zero leaves a tensor where it is, whatever the meta-parameters.
    """

    init: Callable[[Params], Slots]
    update: Callable[[Updates, Slots, Point], tuple[Updates, Slots]]
    learned: Callable[[Params], dict[str, Tensor]] = nothing
    rests: bool = False


def stateless(
    transform: Callable[[Updates, Point], Updates],
    learned: Callable[[Params], dict[str, Tensor]] = nothing,
    rests: bool = False,
) -> Rule:
    """A rule without memory, from ``transform(grads, point) -> updates``."""
    return Rule(nothing, lambda grads, slots, point: (transform(grads, point), slots), learned, rests)


def chain(*rules: Rule) -> Rule:
    """Apply rules one after another; the slots of rule i start with ``i.``."""

    def init(fast: Params) -> Slots:
        return {f"{i}.{name}": value for i, rule in enumerate(rules) for name, value in rule.init(fast).items()}

    def update(grads: Updates, slots: Slots, point: Point) -> tuple[Updates, Slots]:
        after: Slots = {}
        for i, rule in enumerate(rules):
            own = {name.removeprefix(f"{i}."): value for name, value in slots.items() if name.startswith(f"{i}.")}
            grads, own = rule.update(grads, own, point)
            after |= {f"{i}.{name}": value for name, value in own.items()}
        return grads, after

    def learned(fast: Params) -> dict[str, Tensor]:
        return {name: value for rule in rules for name, value in rule.learned(fast).items()}

    return Rule(init, update, learned, all(rule.rests for rule in rules))


def by_prefix(values: Mapping[str, float], name: str) -> float:
    """The value whose key ``name`` starts with, such as 0.1 of ``{"model.": 0.1}``."""
    for prefix, value in values.items():
        if name.startswith(prefix):
            return value
    raise KeyError(f"No step size for {name!r}: factors are given for {', '.join(values)}.")


def scale(factors: Mapping[str, float]) -> Rule:
    """Multiply each gradient by the factor whose key its name starts with, such as ``{"model.": -0.1}``."""
    return stateless(
        lambda grads, point: {name: by_prefix(factors, name) * grad for name, grad in grads.items()}, rests=True
    )


def clip_by_global_norm(max_norm: float) -> Rule:
    """Scale all gradients down together so that their joint Euclidean norm is at most ``max_norm``."""

    def transform(grads: Updates, point: Point) -> Updates:
        norm = torch.sqrt(sum((grad.square().sum() for grad in grads.values()), torch.tensor(1e-24)))
        ratio = torch.clamp(max_norm / norm, max=1.0)
        return {name: grad * ratio for name, grad in grads.items()}

    return stateless(transform, rests=True)


def add_decayed_weights(weight_decay: float) -> Rule:
    """Add ``weight_decay`` times the parameter to its gradient."""
    return stateless(lambda grads, point: {name: g + weight_decay * point.fast[name] for name, g in grads.items()})


def trace(decay: float) -> Rule:
    """Momentum: an undamped running sum ``m ← decay · m + g``, as torch's SGD has it (Polyak 1964)."""

    def update(grads: Updates, slots: Slots, point: Point) -> tuple[Updates, Slots]:
        sums = {name: decay * slots[name] + grad for name, grad in grads.items()}
        return sums, sums

    return Rule(lambda fast: {name: torch.zeros_like(value) for name, value in fast.items()}, update, rests=True)


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 1e-16) -> Rule:
    """Adam's direction (Kingma and Ba 2015). ``eps_root`` keeps the derivative of the root finite at zero."""

    def init(fast: Params) -> Slots:
        return {f"{slot}.{n}": torch.zeros_like(value) for slot in ("first", "second") for n, value in fast.items()}

    def update(grads: Updates, slots: Slots, point: Point) -> tuple[Updates, Slots]:
        first = {n: b1 * slots[f"first.{n}"] + (1 - b1) * grad for n, grad in grads.items()}
        second = {n: b2 * slots[f"second.{n}"] + (1 - b2) * grad.square() for n, grad in grads.items()}
        debias1, debias2 = 1 - b1 ** (point.step + 1), 1 - b2 ** (point.step + 1)
        updates = {n: (first[n] / debias1) / (torch.sqrt(second[n] / debias2 + eps_root) + eps) for n in grads}
        after = {f"first.{n}": v for n, v in first.items()} | {f"second.{n}": v for n, v in second.items()}
        return updates, after

    return Rule(init, update, rests=True)


def scale_by_learned_rates(learning_rates: Mapping[str, float]) -> Rule:
    """Meta-SGD (Li et al. 2017, arXiv:1707.09835): a learned rate for every coordinate, in place of one for all.

    Each tensor has rates of its own shape, as ``learned`` is shown it.
    """

    def learned(fast: Params) -> dict[str, Tensor]:
        return {
            f"{OWNER}rate.{name}": torch.full_like(value, by_prefix(learning_rates, name))
            for name, value in fast.items()
        }

    return stateless(
        lambda grads, point: {name: -point.params[f"{OWNER}rate.{name}"] * grad for name, grad in grads.items()},
        learned,
        rests=True,
    )


def scale_by_step_rates(learning_rates: Mapping[str, float], steps: int) -> Rule:
    """MAML++ (Antoniou et al. 2019, arXiv:1810.09502): a learned rate for every tensor and step, ``[steps]`` a tensor.

    Steps beyond ``steps`` take the last one's rate.
    """

    def learned(fast: Params) -> dict[str, Tensor]:
        return {
            f"{OWNER}rate.{name}": value.new_full((max(steps, 1),), by_prefix(learning_rates, name))
            for name, value in fast.items()
        }

    def transform(grads: Updates, point: Point) -> Updates:
        at = min(point.step, max(steps, 1) - 1)
        return {name: -point.params[f"{OWNER}rate.{name}"][at] * grad for name, grad in grads.items()}

    return stateless(transform, learned, rests=True)


def sgd(learning_rates: Mapping[str, float]) -> Rule:
    """Gradient descent; step sizes by name prefix."""
    return scale({prefix: -rate for prefix, rate in learning_rates.items()})


def momentum(learning_rates: Mapping[str, float], decay: float = 0.9) -> Rule:
    """Gradient descent with momentum; step sizes by name prefix."""
    return chain(trace(decay), sgd(learning_rates))


def adam(learning_rates: Mapping[str, float]) -> Rule:
    """Adam; step sizes by name prefix."""
    return chain(scale_by_adam(), sgd(learning_rates))


def build_rule(
    name: str,
    learning_rates: Mapping[str, float],
    *,
    steps: int,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
) -> Rule:
    """The rule ``name`` of ``RULES``, after clipping and weight decay, if any.

    Args:
        name: key of ``RULES``.
        learning_rates: step size, or where a learned one starts, by name prefix.
        steps: inner steps that a rate by step is learned for.
        weight_decay: L2 decay, as ``torch.optim.SGD`` adds it to the gradient.
        max_grad_norm: joint norm that gradients are clipped to before.
    """
    parts = [RULES[name](learning_rates, steps)]
    if weight_decay:
        parts.insert(0, add_decayed_weights(weight_decay))
    if max_grad_norm is not None:
        parts.insert(0, clip_by_global_norm(max_grad_norm))
    return chain(*parts) if len(parts) > 1 else parts[0]


RULES: dict[str, Callable[[Mapping[str, float], int], Rule]] = {
    "sgd": lambda rates, steps: sgd(rates),
    "momentum": lambda rates, steps: momentum(rates),
    "adam": lambda rates, steps: adam(rates),
    "meta_sgd": lambda rates, steps: scale_by_learned_rates(rates),
    "step_rates": scale_by_step_rates,
}
