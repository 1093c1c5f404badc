"""What every learner shares: parameters, prediction, and the gradient of the query loss through adaptation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.call import check_names
from fewshot_nlp.functional.outer import leaves
from fewshot_nlp.models.cache import FixedModel
from fewshot_nlp.models.heads import Head, build_head
from fewshot_nlp.models.model import FewShotModel
from fewshot_nlp.types import OUT_OF_SCOPE, Batch, Episode, MetaGrad, Params, State


def episode_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the queries whose class is in the episode."""
    return cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels, ignore_index=OUT_OF_SCOPE)


def episode_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers among the queries whose class is in the episode."""
    known = labels != OUT_OF_SCOPE
    return (logits.argmax(dim=-1)[known] == labels[known]).float().mean()


class BaseLearner(ABC):
    """A learner made of a model and a head; a method adds ``_adapt``.

    Attributes:
        model: features under given parameters.
        head: how features become logits.
        config: the settings both were built from.
    """

    transductive: ClassVar[bool] = False
    #: Whether a task may change the adapter, and with it the features, or its head alone.
    fast_body: ClassVar[bool] = True

    def __init__(self, config: FewShotConfig, model: FewShotModel) -> None:
        self.config = config
        self.model = model
        self.head: Head = build_head(config)
        self._check_step_loss_weights()

    def __reduce__(self) -> tuple[type[BaseLearner], tuple[FewShotConfig, FewShotModel]]:
        # Settings and model are all there is to a learner; update rules are closures, which pickle cannot write.
        return type(self), (self.config, self.model)

    def _check_step_loss_weights(self) -> None:
        if self.config.step_loss_weights is not None:
            raise ValueError(
                f"step_loss_weights={self.config.step_loss_weights} weigh inner steps, and learner="
                f"{self.config.learner!r} has none. Leave them out, or use one with an inner loop, such as 'maml'."
            )

    def init_params(self) -> dict[str, Tensor]:
        device = self.model.device
        return {**self.model.init_params(), **{n: v.to(device) for n, v in self.head.init_params().items()}}

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the meta-parameters."""
        return frozenset(self.init_params())

    @abstractmethod
    def _adapt(self, params: Params, support: Batch) -> State:
        """State of the task, as a differentiable function of ``params``."""

    def adapt(self, params: Params, support: Batch) -> State:
        check_names(params, self.names)
        with torch.inference_mode(False), torch.enable_grad():
            state = self._adapt(leaves(params), support.recordable())
        return {name: value.detach() for name, value in state.items()}

    def predict(self, params: Params, state: State, query: Batch) -> Tensor:
        return self.head.logits(params, state, self.model.features({**params, **state}, query.inputs))

    def fixed(self, params: Params) -> BaseLearner:
        """This learner for many tasks under the same ``params``: the same answers, and where no task changes the
        features, each distinct text goes through the backbone once."""
        if self.fast_body:
            return self
        return type(self)(self.config, FixedModel(self.model, params))

    def meta_grad(self, params: Params, episodes: Sequence[Episode]) -> MetaGrad:
        """Sum of the episodes' gradients, one episode at a time so that memory holds one task's graph."""
        check_names(params, self.names)
        with self.model.frozen_in(self.config.frozen_dtype):
            parts = [self._episode_grad(params, episode) for episode in episodes]
        if not parts:
            zero = next(iter(params.values())).new_zeros(())
            return MetaGrad({name: torch.zeros_like(value) for name, value in params.items()}, zero, zero, 0)
        return sum(parts[1:], parts[0])

    def _episode_grad(self, params: Params, episode: Episode) -> MetaGrad:
        with torch.inference_mode(False), torch.enable_grad():
            theta = leaves(params)
            state = self._adapt(theta, episode.support)
            logits = self.predict(theta, state, episode.query)
            loss = episode_loss(logits, episode.query.labels)
            grads = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
        return self._part(dict(zip(theta, grads, strict=True)), logits.detach(), episode)

    def _part(self, grads: dict[str, Tensor], logits: Tensor, episode: Episode) -> MetaGrad:
        labels = episode.query.labels
        return MetaGrad(grads, episode_loss(logits, labels), episode_accuracy(logits, labels), 1, [logits])
