"""Prototypical networks: Snell, Swersky and Zemel, NeurIPS 2017 (arXiv:1703.05175).

A class is the mean ``c`` of its support features; a query goes to the nearest one. No inner loop: the adapter itself
is trained so that the means separate. Cosine similarity with a learned scale is the default here; the paper's squared
Euclidean distance is ``distance="euclidean"``.
"""

from __future__ import annotations

from fewshot_nlp.learners.base import BaseLearner
from fewshot_nlp.types import Batch, Params, State


class ProtoNet(BaseLearner):
    """Class means under a trained adapter; with ``head="linear"`` the head starts, and stays, at the prototypes."""

    title = "prototypical networks ([Snell et al. 2017](https://arxiv.org/abs/1703.05175))"
    fast_body = False

    def _adapt(self, params: Params, support: Batch) -> State:
        features = self.features(params, support.inputs)
        return self.head.start(params, features, support.labels, support.n_way)
