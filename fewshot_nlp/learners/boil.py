"""BOIL: Body Only update in the Inner Loop, Oh et al., ICLR 2021 (arXiv:2008.08882).

The opposite of ANIL: a task changes the features, and the head stays where it starts (inner step size 0), so that the
body must learn to move its features towards what the head asks for. Here the head starts at the task's prototypes under
the meta-parameters, which lets any number of classes be told apart.
"""

from __future__ import annotations

from typing import ClassVar

from fewshot_nlp.learners.gradient import GradientLearner


class BOIL(GradientLearner):
    """MAML whose inner loop changes the adapter alone."""

    title = "BOIL ([Oh et al. 2021](https://arxiv.org/abs/2008.08882))"
    tasks = ("classification",)
    implied: ClassVar = {"head": "linear", "head_init": "prototype", "head_learning_rate": 0.0}
