"""CAVIA: Zintgraf et al., Fast Context Adaptation via Meta-Learning, ICML 2019 (arXiv:1810.03642).

A task changes a small context ``c`` alone, which starts at zero; everything else ``θ`` is shared by all tasks and is
only meta-learned::

    c_0 = 0,   c_{k+1} = c_k - α ∇_c S(θ, c_k),   meta-gradient = dQ(θ, c_K) / dθ

The context ``c`` ``[context_size]`` scales and shifts the features ``f`` ``[n, hidden_size]`` (FiLM, as the paper does
for images)::

    f' = f ∘ (1 + W_γ c) + W_β c

Classes are the prototypes of ``f'``, so that the head has no weights that a task could change; the output layer of a
regression is shared like the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewshot_nlp.checks import at_least
from fewshot_nlp.learners.gradient import GradientLearner
from fewshot_nlp.types import Params

CONTEXT = "learner.context"


@dataclass
class CAVIAOptions:
    """``context_size``: numbers that a task changes."""

    context_size: int = 16

    def __post_init__(self) -> None:
        at_least("context_size", self.context_size, 1)


class CAVIA(GradientLearner):
    """A context vector adapts to the task; adapter and modulation are shared."""

    title = "CAVIA ([Zintgraf et al. 2019](https://arxiv.org/abs/1810.03642))"
    implied: ClassVar = {"head": "prototype"}
    fast_head = False
    Options = CAVIAOptions

    def build_networks(self) -> dict[str, nn.Module]:
        size = self.model.hidden_size
        return {each: nn.Linear(self.options.context_size, size, bias=False) for each in ("scale", "shift")}

    def features(self, params: Params, inputs: dict[str, Tensor]) -> Tensor:
        features, context = super().features(params, inputs), params.get(CONTEXT)
        if context is None:
            return features
        scale, shift = (self.networks(each, params, context) for each in ("scale", "shift"))
        return features * (1 + scale) + shift

    def _body(self, params: Params) -> dict[str, Tensor]:
        weight = params["learner.scale.weight"]
        return {CONTEXT: torch.zeros_like(weight[0]).requires_grad_()}
