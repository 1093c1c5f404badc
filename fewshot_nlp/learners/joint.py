"""Joint training on source and target tasks, then adaptation: transfer learning without an inner loop in training.

With ``L_t(θ)`` the query loss of task ``t`` under weights that all tasks share, its class means being its classifier,
and a target data set whose tasks weigh λ::

    J(θ) = Σ_{t in sources} L_t(θ) + λ Σ_{t in target} L_t(θ)
    answers to a new task: K steps of the inner rule on its support loss, from θ (fine-tuning)

A step takes the mean of the weighted losses over its tasks, which the training mixture draws from sources and target
(``mixture_dataset_names``). A task is of the target if its pool, which is its data set's name, is ``target``. Joint
training of a shared representation is multi-task learning (Caruana 1997); with no source it is ordinary transfer, and
what MAML adds to it is that its loss is taken after the steps. The loss and accuracy that are reported are after them
here, too: those of the answers that would be given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewshot_nlp.checks import at_least
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.learners.base import BaseLearner
from fewshot_nlp.learners.gradient import GradientLearner
from fewshot_nlp.models.model import PREFIX, FewShotModel
from fewshot_nlp.types import Episode, MetaGrad, Params


@dataclass
class JointOptions:
    """``target``: name of the target's pool, all tasks weigh alike if not given; ``weight``: λ."""

    target: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.target is not None and (not isinstance(self.target, str) or not self.target):
            raise ValueError(f"target={self.target!r} must be the name of a data set, such as home_intents.")
        at_least("weight", self.weight, 0.0, float)


class Joint(GradientLearner):
    """Trained jointly on source and target tasks, without inner steps; adapted to a new task by inner steps."""

    title = "joint training on source and target tasks, then fine-tuning"
    tasks = ("classification",)
    implied: ClassVar = {"head_init": "prototype", "estimator": None, "step_loss_weights": None, "proximal": 0.0}
    Options: ClassVar[type] = JointOptions

    def __init__(self, config: FewShotConfig, model: FewShotModel) -> None:
        super().__init__(config, model)
        if self.rule.learned({PREFIX: torch.zeros(1)}):
            raise ValueError(
                f"learner='joint' takes no inner step in training and cannot learn the rates of inner_rule="
                f"{config.inner_rule!r}. Use 'sgd', 'momentum' or 'adam'."
            )

    def _episode_grad(self, params: Params, episode: Episode) -> MetaGrad:
        part = BaseLearner._episode_grad(self, params, episode)
        with torch.no_grad():
            answers = self.predict(params, self._adapted(params, episode.support), episode.query)
        return self._part(part.grads, answers, episode.query.labels)

    def _objective(self, params: Params, episode: Episode) -> tuple[Tensor, Tensor]:
        support, query = episode.support, episode.query
        weight = self.options.weight if episode.spec.pool == self.options.target else 1.0
        features = self.features(params, support.inputs)
        state = self.head.start(params, features, support.labels, support.n_way)
        logits = self.head.logits(params, state, self.features(params, query.inputs))
        return weight * self.loss(logits, query.labels), logits
