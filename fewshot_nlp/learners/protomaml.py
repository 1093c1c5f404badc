"""ProtoMAML: Triantafillou et al., Meta-Dataset, ICLR 2020 (arXiv:1903.03096), section 3.

MAML whose linear head starts each task at the prototypes ``c`` of its support set, where it equals a prototypical
network; the inner loop goes on from there, and the meta-gradient passes through the start::

    w_k = 2 c_k,   b_k = -|c_k|²          (Euclidean; under cosine w_k = c_k / |c_k|, b_k = 0)
"""

from __future__ import annotations

from typing import ClassVar

from fewshot_nlp.learners.gradient import GradientLearner


class ProtoMAML(GradientLearner):
    """MAML over the adapter and a linear head that starts at the class means."""

    title = "ProtoMAML ([Triantafillou et al. 2020](https://arxiv.org/abs/1903.03096))"
    tasks = ("classification",)
    implied: ClassVar = {"head": "linear", "head_init": "prototype"}
