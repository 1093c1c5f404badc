"""Domain-adversarial training: Ganin et al., JMLR 2016 (arXiv:1505.07818), of a prototypical network.

Tasks come from a source domain; texts of the target domain come without labels. A discriminator ``D`` is trained to
tell the two by their features ``f`` ``[n, hidden_size]``, and the features to leave it in the dark, by a layer ``R``
that is the identity forwards and multiplies the gradient by -λ backwards. With the task loss ``Q`` and the mean binary
cross-entropies of the domains::

    L_d = ½ mean_{x in source} -log(1 - σ(D(R f(x)))) + ½ mean_{x in target} -log σ(D(R f(x)))
    meta-gradient:  dQ/dθ - λ dL_d/dθ  for the features,   dL_d/dω  for the discriminator's weights ω

That is no derivative of one loss, but the direction of a saddle point. ``D`` is a perceptron of one hidden layer; the
source texts are the support and query sets, and the target ones ``episode.unlabelled``. At the training episode of
index ``i``, which its address tells, λ is ``weight (2 / (1 + e^{-10 i / ramp_episodes}) - 1)``, the paper's schedule,
or constant where ``ramp_episodes`` is 0. Answers do not need ``D``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fewshot_nlp.checks import at_least
from fewshot_nlp.learners.protonet import ProtoNet
from fewshot_nlp.types import Episode, Params


@dataclass
class DomainAdversarialOptions:
    """``weight``: the largest λ; ``ramp_episodes``: length of its rise; ``hidden_size``: of the discriminator."""

    weight: float = 0.1
    ramp_episodes: int = 0
    hidden_size: int = 128

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0.0, float)
        at_least("ramp_episodes", self.ramp_episodes, 0)
        at_least("hidden_size", self.hidden_size, 1)

    def at(self, episode: int) -> float:
        """λ at the training episode of this index."""
        if not self.ramp_episodes:
            return self.weight
        return self.weight * (2 / (1 + math.exp(-10 * min(episode / self.ramp_episodes, 1.0))) - 1)


def reverse(features: Tensor, weight: float) -> Tensor:
    """The same numbers; gradients come back multiplied by ``-weight``."""
    fixed = features.detach()
    return fixed + weight * (fixed - features)


class DomainAdversarial(ProtoNet):
    """Class means of features that do not tell the domains apart."""

    title = "domain-adversarial prototypes ([Ganin et al. 2016](https://arxiv.org/abs/1505.07818))"
    reads_unlabelled = True
    Options: ClassVar[type] = DomainAdversarialOptions

    def build_networks(self) -> dict[str, nn.Module]:
        size = self.options.hidden_size
        return {"discriminator": nn.Sequential(nn.Linear(self.model.hidden_size, size), nn.ReLU(), nn.Linear(size, 1))}

    def _objective(self, params: Params, episode: Episode) -> tuple[Tensor, Tensor]:
        support, query, target = episode.support, episode.query, episode.unlabelled
        if target is None:
            raise ValueError(
                f"The episode {episode.spec.address} has no unlabelled inputs, and learner='domain_adversarial' needs "
                f"some. Set n_unlabelled, or give EpisodeReader unlabelled=... and n_unlabelled=..."
            )
        ours, asked, theirs = (self.features(params, part.inputs) for part in (support, query, target))
        state = self.head.start(params, ours, support.labels, support.n_way)
        logits = self.head.logits(params, state, asked)
        domain = self.domain_loss(params, torch.cat([ours, asked]), theirs, self.options.at(episode.spec.index))
        return self.loss(logits, query.labels) + domain, logits

    def domain_loss(self, params: Params, source: Tensor, target: Tensor, weight: float) -> Tensor:
        """``L_d`` of the features of both domains, which it reaches reversed."""
        ours, theirs = (
            self.networks("discriminator", params, reverse(part, weight)).squeeze(-1) for part in (source, target)
        )
        return (softplus(ours).mean() + softplus(-theirs).mean()) / 2
