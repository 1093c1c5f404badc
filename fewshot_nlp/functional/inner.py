"""The inner loop: a few steps of an update rule on one task, as a function of its start."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fewshot_nlp.functional.rules import Rule

Fast = dict[str, Tensor]


def inner_loop(gradient: Callable[[Fast, int], Fast], fast: Fast, rule: Rule, steps: int) -> Fast:
    """Take ``steps`` updates from ``fast`` along ``gradient(fast, step)``.

    The loop itself is differentiable: whether a meta-gradient flows through the inner gradients is decided by whether
    ``gradient`` returns them with a graph (exact) or detached (first order). MAML, Finn et al. 2017, equation 1.
    """
    state = rule.init(fast)
    for step in range(steps):
        updates, state = rule.update(gradient(fast, step), state, fast)
        fast = {name: value + updates[name] for name, value in fast.items()}
    return fast
