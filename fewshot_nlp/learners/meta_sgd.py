"""Meta-SGD: Li, Zhou, Chen and Li 2017 (arXiv:1707.09835).

As MAML, with a step size ``α`` for every single weight, learned with the start, signs included::

    φ_{k+1} = φ_k - α ∘ ∇S(φ_k),   meta-parameters (θ, α)
"""

from __future__ import annotations

from typing import ClassVar

from fewshot_nlp.learners.gradient import GradientLearner


class MetaSGD(GradientLearner):
    """MAML with a learned rate for every weight. Rates start at the inner learning rate."""

    title = "Meta-SGD ([Li et al. 2017](https://arxiv.org/abs/1707.09835))"
    implied: ClassVar = {"inner_rule": "meta_sgd"}
