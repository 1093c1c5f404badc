"""Estimators of the meta-gradient of one episode: ``estimator(learner, params, episode)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from fewshot_nlp.functional.implicit import implicit_gradient
from fewshot_nlp.functional.outer import Carry, adapt, meta_gradient
from fewshot_nlp.functional.rules import by_prefix
from fewshot_nlp.learners.stacking import by_task, is_stack
from fewshot_nlp.types import Episode, MetaGrad, Params

if TYPE_CHECKING:
    from torch import Tensor

    from fewshot_nlp.learners.gradient import GradientLearner


def backpropagated(learner: GradientLearner, params: Params, episode: Episode, exact_steps: int | None) -> MetaGrad:
    """Through the inner loop, with the inner gradients of its last ``exact_steps`` differentiated."""
    links, chunk = learner.links(episode.support, exact_steps), learner.chunk
    # Steps that are not differentiated leave no graph to save memory on, and one link has nothing to share it with.
    if chunk is None and len(links) > 1 and (exact_steps != 0 or learner.config.step_loss_weights):
        chunk = learner.steps_in_memory(episode.support, episode.query)
    outcome = meta_gradient(
        links,
        partial(learner._query_loss, episode),
        params,
        chunk=chunk,
        weights=learner.config.step_loss_weights,
        seed=episode.spec.index,
    )
    return learner._part(outcome.grads, outcome.extra, episode.query.labels)


def start_minus_adapted(learner: GradientLearner, params: Params, episode: Episode) -> MetaGrad:
    """Reptile's direction: from the adapted weights to the start. Zero for what no task changes."""
    state = learner._adapted(params, episode.support)
    with torch.no_grad():
        _, logits = learner._answered(params, state, episode.query)
        moved = by_task(episode.support, partial(learner.displacement, params), state)
        if is_stack(episode.support):
            moved = {name: value.sum(dim=0) for name, value in moved.items()}
        grads = {name: moved[name] if name in moved else torch.zeros_like(value) for name, value in params.items()}
    return learner._part(grads, logits, episode.query.labels)


def implicit(learner: GradientLearner, params: Params, episode: Episode) -> MetaGrad:
    """iMAML: from the end of the inner loop alone."""
    support, decay = episode.support, learner.config.inner_weight_decay
    fast = adapt(learner.links(support), params).fast
    moving = [name for name in fast if by_prefix(learner.rates, name)]
    if not support.teaches or not moving:
        # The loop ends at its start.
        return backpropagated(learner, params, episode, None)

    def slope(theta: Params, fast: dict[str, Tensor]) -> dict[str, Tensor]:
        features = learner.features({**theta, **fast}, support.inputs)
        grads, _ = learner._inner_gradient(theta, fast, features, support, create_graph=True)
        return {name: grad + decay * fast[name] for name, grad in grads.items()}

    outcome = implicit_gradient(
        lambda theta: learner._start(theta, support)[0],
        slope,
        lambda theta, fast: learner._query_loss(episode, theta, Carry(fast, {})),
        params,
        fast,
        moving=moving,
        proximal=learner.config.proximal,
        steps=learner.config.conjugate_gradient_steps,
    )
    return learner._part(outcome.grads, outcome.extra, episode.query.labels)


ESTIMATORS: dict[str, Callable[[GradientLearner, Params, Episode], MetaGrad]] = {
    "exact": lambda learner, params, episode: backpropagated(learner, params, episode, None),
    "first_order": lambda learner, params, episode: backpropagated(learner, params, episode, 0),
    "truncated": lambda learner, params, episode: backpropagated(
        learner, params, episode, learner.config.truncated_steps
    ),
    "implicit": implicit,
    "reptile": start_minus_adapted,
}
