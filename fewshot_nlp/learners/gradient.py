"""Learning a task by gradient steps: one learner with three independent choices.

*fast*: which weights a task may change; *rule*: how a step changes them; *estimator*: how the meta-gradient passes
back through the steps. MAML, first-order MAML, ANIL and Reptile are cells of that table, one file each.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.inner import Fast, inner_loop
from fewshot_nlp.functional.rules import RULES
from fewshot_nlp.learners.base import BaseLearner, episode_loss
from fewshot_nlp.models.model import PREFIX, FewShotModel
from fewshot_nlp.types import Batch, Params, State


class GradientLearner(BaseLearner):
    """``inner_steps`` of the inner rule on the support loss, from the meta-parameters.

    The state of a task holds the adapted tensors under their own names, and the head's state.
    """

    #: Whether the meta-gradient contains the derivative of the inner gradients.
    second_order: ClassVar[bool] = True

    def __init__(self, config: FewShotConfig, model: FewShotModel) -> None:
        super().__init__(config, model)
        if not self.fast_body and not self.head.fast:
            raise ValueError(
                f"learner={config.learner!r} adapts the head alone, and head={config.head!r} has no weights to adapt. "
                f"Use head='linear', or learner='protonet'."
            )
        if self.fast_body and not model.trainable:
            raise ValueError(
                f"learner={config.learner!r} adapts the adapter, and adapter={config.adapter!r} has none. "
                f"Use adapter='prompt_tuning', 'lora' or 'full', or learner='protonet'."
            )
        head_rate = config.inner_learning_rate if config.head_learning_rate is None else config.head_learning_rate
        self.rule = RULES[config.inner_rule]({PREFIX: config.inner_learning_rate, "head.": head_rate})

    def _adapt(self, params: Params, support: Batch, create_graph: bool) -> State:
        follow = create_graph and self.second_order
        features = self.model.features(params, support.inputs)
        head = self.head.start(params, features, support.labels, support.n_way)
        body = {n: v for n, v in params.items() if n.startswith(PREFIX)} if self.fast_body else {}
        # A start that follows from no parameter, such as zero, is differentiated too.
        start: Fast = {**body, **({n: v.requires_grad_() for n, v in head.items()} if self.head.fast else {})}

        def gradient(fast: Fast, step: int) -> Fast:
            moved = step > 0 and self.fast_body
            made = self.model.features({**params, **fast}, support.inputs) if moved else features
            # The head may have been made from these very features. A view parts the loss's direct path from that one,
            # so that step 0 needs no second forward pass.
            seen = made.view_as(made)
            state = fast if self.head.fast else self.head.start(params, seen, support.labels, support.n_way)
            loss = episode_loss(self.head.logits(params, state, seen), support.labels)
            own = {name: value for name, value in fast.items() if name not in body}
            options: dict[str, Any] = {"create_graph": follow, "retain_graph": True, "materialize_grads": True}
            if not body:
                return dict(zip(fast, torch.autograd.grad(loss, list(own.values()), **options), strict=True))
            pull, *grads = torch.autograd.grad(loss, [seen, *own.values()], **options)
            # Back through the backbone: the vector-Jacobian product of the features with the head's pull.
            weights = [fast[name] for name in body]
            grads = [*torch.autograd.grad(made, weights, grad_outputs=pull, **options), *grads]
            return dict(zip(fast, grads, strict=True))

        fast = inner_loop(gradient, start, self.rule, self.config.inner_steps)
        if self.head.fast:
            return fast
        features = self.model.features({**params, **fast}, support.inputs)
        return {**fast, **self.head.start(params, features, support.labels, support.n_way)}


def meta_difference(params: Params, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum over tasks of ``start - adapted``, by name; zero where a task has no adapted value."""
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    for state in states:
        for name in total.keys() & state.keys():
            total[name] += params[name] - state[name]
    return total
