"""Reptile: Nichol, Achiam and Schulman 2018, On First-Order Meta-Learning Algorithms (arXiv:1803.02999).

A task's adapted weights pull the start towards themselves::

    meta-gradient = θ - φ_K(θ),   averaged over tasks

so that an outer step of plain SGD with learning rate ε is the paper's ``θ ← θ + ε (φ_K - θ)``. Query examples take no
part in it; their loss and accuracy are reported as for any other learner.
"""

from __future__ import annotations

import torch

from fewshot_nlp.learners.gradient import GradientLearner, meta_difference
from fewshot_nlp.types import Episode, MetaGrad, Params


class Reptile(GradientLearner):
    """Reptile over the adapter. The scale of the logits, which no task changes, stays as it is."""

    second_order = False

    def _episode_grad(self, params: Params, episode: Episode) -> MetaGrad:
        state = self.adapt(params, episode.support)
        with torch.no_grad():
            logits = self.predict(params, state, episode.query)
            grads = meta_difference(params, [state])
        return self._part(grads, logits, episode)
