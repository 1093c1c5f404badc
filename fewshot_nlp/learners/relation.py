"""Relation networks: Sung et al., Learning to Compare, CVPR 2018 (arXiv:1711.06025).

A learned module ``g`` scores how much a query ``q`` ``[size]`` relates to a class ``c`` ``[size]``, the mean of its
support features (the paper sums them, which ties the scale to the number of shots)::

    r_c = g([c, q, |c - q|, c ∘ q]),   logit_c = s · (r_c + cos(c, q))

The paper concatenates feature maps and lets convolutions compare them; on vectors the absolute difference and the
product stand in for what convolutions would find. Both vectors are scaled to a mean square of one first. ``g`` is a
perceptron of one hidden layer whose last layer starts at zero: with the cosine (``residual``) an untrained learner
answers as prototypes do; without, it is the paper's and learns to compare from nothing.

``loss="mse"`` is the paper's: the squared error of ``σ(logit)`` ``[n_query, n_way]`` against 0 and 1, summed over
classes. A cross-entropy over the same logits is the default: the classes of an episode exclude each other, and the
squared error has next to no slope where a sigmoid is far on the wrong side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, rms_norm

from fewshot_nlp.checks import at_least, choice
from fewshot_nlp.learners.protonet import ProtoNet
from fewshot_nlp.models.heads import SCALE, WEIGHT
from fewshot_nlp.types import OUT_OF_SCOPE, Batch, Params, State


@dataclass
class RelationOptions:
    """``loss``: ``"cross_entropy"`` or ``"mse"``; ``residual``: whether scores start from the head's similarity;
    ``relation_size``: hidden units of the module."""

    loss: str = "cross_entropy"
    residual: bool = True
    relation_size: int = 64

    def __post_init__(self) -> None:
        choice("loss", self.loss, ("cross_entropy", "mse"))
        if not isinstance(self.residual, bool):
            raise ValueError(f"residual={self.residual!r} must be true or false.")
        at_least("relation_size", self.relation_size, 1)


class RelationModule(nn.Module):
    """``g``: scores ``[n_query, n_way]`` of ``classes`` ``[n_way, size]`` and ``queries`` ``[n_query, size]``.

    Args:
        size: of a feature.
        hidden: units between.
        bias: added to every score alike; None for none, as a softmax would not see it.
    """

    def __init__(self, size: int, hidden: int, bias: float | None) -> None:
        super().__init__()
        self.compare = nn.Linear(4 * size, hidden)
        self.score = nn.Linear(hidden, 1, bias=bias is not None)
        nn.init.zeros_(self.score.weight)
        if bias is not None:
            nn.init.constant_(self.score.bias, bias)

    def forward(self, classes: Tensor, queries: Tensor) -> Tensor:
        a, b = torch.broadcast_tensors(_unit(classes)[None], _unit(queries)[:, None])
        pairs = torch.cat([a, b, (a - b).abs(), a * b], dim=-1)
        return self.score(self.compare(pairs).relu()).squeeze(-1)


class Relation(ProtoNet):
    """A learned comparison of queries with class means."""

    title = "relation networks ([Sung et al. 2018](https://arxiv.org/abs/1711.06025))"
    implied: ClassVar = {"head": "prototype"}
    Options = RelationOptions

    def build_networks(self) -> dict[str, nn.Module]:
        bias = None
        if self.options.loss == "mse":
            # A sigmoid must be undecided halfway between no likeness and full likeness.
            bias = -0.5 if self.options.residual else 0.0
        return {"relation": RelationModule(self.model.hidden_size, self.options.relation_size, bias)}

    def predict(self, params: Params, state: State, query: Batch) -> Tensor:
        features = self.features({**params, **state}, query.inputs)
        scores = params[SCALE].exp() * self.networks("relation", params, state[WEIGHT], features)
        return scores + self.head.logits(params, state, features) if self.options.residual else scores

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.options.loss == "cross_entropy":
            return super().loss(logits, labels)
        known = labels != OUT_OF_SCOPE
        wanted = one_hot(labels[known], logits.shape[-1])
        return (logits[known].sigmoid() - wanted).square().sum(dim=-1).mean()


def _unit(features: Tensor) -> Tensor:
    """Rows of mean square one."""
    return rms_norm(features, features.shape[-1:])
