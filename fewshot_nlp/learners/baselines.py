"""What every result is shown beside: learners that were never meta-trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression
from torch import Tensor
from torch.nn.functional import normalize

from fewshot_nlp.functional.call import full_precision
from fewshot_nlp.learners.base import BaseLearner
from fewshot_nlp.learners.gradient import GradientLearner
from fewshot_nlp.models.cache import FrozenFeatures
from fewshot_nlp.models.heads import class_means
from fewshot_nlp.types import Batch, Episode, MetaGrad, Params, State


class _FrozenLearner:
    """A learner with nothing to meta-learn."""

    transductive = False

    def __init__(self, features: FrozenFeatures, label_name_weight: int = 1) -> None:
        self.features = features
        self.label_name_weight = label_name_weight

    def _known(self, support: Batch) -> tuple[Tensor, Tensor]:
        """Features and labels of the support set; names of classes, where there are any, are examples, too."""
        support = support.with_names_as_examples(self.label_name_weight)
        return self.features(support.inputs), support.labels

    def init_params(self) -> dict[str, Tensor]:
        return {}

    def meta_grad(self, params: Params, episodes: Sequence[Episode]) -> MetaGrad:
        raise TypeError(f"{type(self).__name__} has no meta-parameters to train. Evaluate it as it is.")


class FrozenPrototypes(_FrozenLearner):
    """Cosine similarity to the class means of frozen features: the untrained-prototype baseline."""

    def adapt(self, params: Params, support: Batch) -> State:
        return class_means(*self._known(support), support.n_way)

    def predict(self, params: Params, state: State, query: Batch) -> Tensor:
        features = self.features(query.inputs)
        with full_precision(features):
            # The scale changes no answer; 10 gives probabilities of a usual sharpness.
            return 10.0 * features @ normalize(state, dim=-1).T


class LogisticRegression(_FrozenLearner):
    """scikit-learn's logistic regression on frozen unit features (Tian et al., ECCV 2020)."""

    def adapt(self, params: Params, support: Batch) -> State:
        model = SklearnLogisticRegression(C=10.0, max_iter=1000)
        features, labels = self._known(support)
        return model.fit(features.cpu().numpy(), labels.cpu().numpy())

    def predict(self, params: Params, state: State, query: Batch) -> Tensor:
        scores = state.predict_log_proba(self.features(query.inputs).cpu().numpy())
        return torch.from_numpy(np.asarray(scores)).float().to(query.labels.device)


class FineTuning(GradientLearner):
    """Plain fine-tuning with Adam on the support set: the same adapter from its untrained start, and a linear head."""

    estimator = "first_order"
    #: Step size of the head. It and the defaults below were the best of five settings on validation classes of
    #: home_intents; a larger one leaves the class means behind at the first step.
    HEAD_LEARNING_RATE = 0.01

    @classmethod
    def like(
        cls, learner: BaseLearner, steps: int = 10, learning_rate: float = 1e-3, head_init: str = "prototype"
    ) -> FineTuning:
        """Fine-tune what ``learner`` meta-trains, from ``learner``'s own untrained parameters.

        Args:
            learner: whose model, distance and scale to use.
            steps: steps of Adam on the whole support set.
            learning_rate: of the adapter.
            head_init: where the linear head starts; from the class means it is never far behind them. A verbalizer
                starts at the names of the classes.
        """
        speaks = learner.config.head == "verbalizer"
        config = replace(
            learner.config,
            # Nothing has found them under these parameters.
            center_features=False,
            whiten_features=0.0,
            head="verbalizer" if speaks else "linear",
            head_init="names" if speaks else head_init,
            inner_rule="adam",
            inner_steps=steps,
            inner_learning_rate=learning_rate,
            head_learning_rate=cls.HEAD_LEARNING_RATE,
            inner_weight_decay=0.0,
            inner_max_grad_norm=None,
            proximal=0.0,
            step_loss_weights=None,
            estimator=None,
            learner_kwargs=None,
        )
        return cls(config, learner.model)

    @property
    def settings(self) -> dict[str, Any]:
        """How it adapts, for the protocol of a result."""
        names = ("inner_rule", "inner_steps", "inner_learning_rate", "head_learning_rate", "head_init")
        return {name: getattr(self.config, name) for name in names}
