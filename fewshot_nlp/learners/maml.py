"""MAML: Model-Agnostic Meta-Learning, Finn, Abbeel and Levine, ICML 2017 (arXiv:1703.03400).

With support loss ``S`` and query loss ``Q`` of a task, inner step size α and K steps::

    φ_0 = θ,   φ_{k+1} = φ_k - α ∇S(φ_k),   meta-gradient = dQ(φ_K) / dθ

The meta-gradient is exact: it contains the second derivatives of S.
"""

from __future__ import annotations

from fewshot_nlp.learners.gradient import GradientLearner


class MAML(GradientLearner):
    """Exact second-order MAML over the adapter and the head."""

    title = "MAML ([Finn et al. 2017](https://arxiv.org/abs/1703.03400)) with exact second-order gradients"
