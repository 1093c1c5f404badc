"""iMAML: Rajeswaran, Finn, Kakade and Levine, NeurIPS 2019 (arXiv:1909.04630).

The inner loop is pulled to its start, ``min_φ S(φ) + λ/2 |φ - θ|²``, and the meta-gradient needs its end alone::

    g = (I + ∇²S(φ) / λ)^{-1} ∇Q(φ),   by conjugate gradients

It is the exact derivative only at the minimum: take enough steps for the inner loop to get near it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.learners.gradient import GradientLearner
from fewshot_nlp.models.model import FewShotModel


class IMAML(GradientLearner):
    """MAML by implicit differentiation; ``λ`` is ``proximal``, and the paper's 2 where it is not given."""

    title = "iMAML ([Rajeswaran et al. 2019](https://arxiv.org/abs/1909.04630))"
    implied: ClassVar = {"estimator": "implicit"}

    def __init__(self, config: FewShotConfig, model: FewShotModel) -> None:
        super().__init__(config if config.proximal else replace(config, proximal=2.0), model)
