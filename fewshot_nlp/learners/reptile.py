"""Reptile: Nichol, Achiam and Schulman 2018, On First-Order Meta-Learning Algorithms (arXiv:1803.02999).

A task's adapted weights pull the start towards themselves::

    meta-gradient = θ - φ_K(θ),   averaged over tasks

so that an outer step of plain SGD with learning rate ε is the paper's ``θ ← θ + ε (φ_K - θ)``. Query examples take no
part in it; their loss and accuracy are reported as for any other learner.
"""

from __future__ import annotations

from fewshot_nlp.learners.gradient import GradientLearner


class Reptile(GradientLearner):
    """Reptile over the adapter. The scale of the logits, which no task changes, stays as it is."""

    title = "Reptile ([Nichol et al. 2018](https://arxiv.org/abs/1803.02999))"
    estimator = "reptile"
