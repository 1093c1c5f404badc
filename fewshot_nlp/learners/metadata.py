"""A task's start, told by the names of its classes: FiLM, Perez et al. 2018 (arXiv:1709.07871).

The description ``d`` ``[hidden_size]`` of a task is the mean of the unit features of its classes' names, whatever
their order and number. It scales and shifts all features ``f`` ``[n, hidden_size]`` of the task::

    γ' = γ + W_γ d,   β' = β + W_β d,   f' = f ∘ (1 + γ') + β'

``γ, β`` and the matrices are meta-parameters that start at zero, where nothing is changed. To a learner, ``γ'`` and
``β'`` are the start of the task ``θ'`` in place of ``γ`` and ``β``, and it need not know how they were made: the
meta-gradient is its own with respect to ``θ'``, whatever its estimator, drawn back through ``θ'(θ)``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fewshot_nlp.functional.call import full_precision
from fewshot_nlp.types import Params

PREFIX = "film."
SCALE, SHIFT = f"{PREFIX}scale", f"{PREFIX}shift"


def init_params(size: int) -> dict[str, Tensor]:
    """Nothing is scaled or shifted, whatever the description."""
    vectors = {name: torch.zeros(size) for name in (SCALE, SHIFT)}
    return {**vectors, **{f"{name}_by_names": torch.zeros(size, size) for name in vectors}}


def start(params: Params, names: Tensor) -> dict[str, Tensor]:
    """Scale and shift of a task, ``[size]`` each, from the features ``[n_way, size]`` of its classes' names."""
    description = normalize(names, dim=-1).mean(dim=0)
    with full_precision(names):
        return {name: params[name] + params[f"{name}_by_names"] @ description for name in (SCALE, SHIFT)}


def modulate(params: Params, features: Tensor) -> Tensor:
    """Features ``[n, size]`` scaled and shifted."""
    return features * (1 + params[SCALE]) + params[SHIFT]
