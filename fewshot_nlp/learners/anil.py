"""ANIL: Almost No Inner Loop, Raghu et al., ICLR 2020 (arXiv:1909.09157).

A task changes its head alone; the body is meta-learned through the exact gradient. The support features are computed
once, whatever the number of steps.
"""

from __future__ import annotations

from fewshot_nlp.learners.gradient import GradientLearner


class ANIL(GradientLearner):
    """MAML whose inner loop changes the head alone; needs ``head="linear"``."""

    title = "ANIL ([Raghu et al. 2020](https://arxiv.org/abs/1909.09157))"
    fast_body = False
