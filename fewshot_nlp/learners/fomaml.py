"""First-order MAML: Finn et al. 2017, section 5.2; Nichol, Achiam and Schulman 2018 (arXiv:1803.02999).

As MAML, with the inner gradients taken as constants: ``dφ_K / dθ = I``. The way from the meta-parameters to the head's
start and to the learned scale is kept, as it holds no second derivative of the support loss.
"""

from __future__ import annotations

from fewshot_nlp.learners.gradient import GradientLearner


class FOMAML(GradientLearner):
    """First-order MAML over the adapter and the head."""

    title = "first-order MAML ([Finn et al. 2017](https://arxiv.org/abs/1703.03400))"
    estimator = "first_order"
