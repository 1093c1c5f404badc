"""MAML++: Antoniou, Edwards and Storkey, How to train your MAML, ICLR 2019 (arXiv:1810.09502).

Of its changes to MAML, those that apply to a frozen backbone with an adapter: a learned step size ``α_{l,k}`` for every
tensor and step, and the query loss after every step, weighted (multi-step loss)::

    φ_{k+1} = φ_k - α_{l,k} ∇S(φ_k),   meta-loss = Σ_k w_k Q(φ_{k+1})

The paper moves the weights ``w`` from all alike to the last step alone as training goes on; here they are constant, all
alike unless ``step_loss_weights`` says otherwise. Its cosine schedule is ``lr_scheduler_type``; its batch-norm changes
have nothing to act on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.learners.gradient import GradientLearner
from fewshot_nlp.models.model import FewShotModel


class MAMLPlusPlus(GradientLearner):
    """MAML with learned rates by tensor and step, and a loss after every step."""

    title = "MAML++ ([Antoniou et al. 2019](https://arxiv.org/abs/1810.09502))"
    implied: ClassVar = {"inner_rule": "step_rates"}

    def __init__(self, config: FewShotConfig, model: FewShotModel) -> None:
        if config.step_loss_weights is None and config.inner_steps:
            config = replace(config, step_loss_weights=[1 / config.inner_steps] * config.inner_steps)
        super().__init__(config, model)
