"""Normalised aggregation: Reptile in which no task dominates by scale.

Reptile averages the adapted weights ``φ_i`` of its tasks, so that a task whose inner loop travels far outweighs the
others. Here each is normalised first. With ``of="step"`` it is drawn back to a fixed distance ``r`` from the start, in
the direction it went; with ``of="weights"`` it gets the length of the start, so that its direction alone counts::

    step:     φ̂_i = θ + r (φ_i - θ) / |φ_i - θ|          weights:  φ̂_i = |θ| φ_i / |φ_i|
    meta-gradient = θ - mean_i φ̂_i

Norms run over all meta-parameters that a task changes, together. A task that moved nothing counts as the start itself.
The average of unit steps is that of normalised gradient descent (Nesterov 1984; Yu et al. 2017, arXiv:1707.04822, for
its use with many losses of unlike scale).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewshot_nlp.checks import at_least, choice
from fewshot_nlp.learners.reptile import Reptile
from fewshot_nlp.types import Params


@dataclass
class NormalisedOptions:
    """``of``: what is normalised, ``"step"`` or ``"weights"``; ``radius``: the length ``r`` of a normalised step."""

    of: str = "step"
    radius: float = 1.0

    def __post_init__(self) -> None:
        choice("of", self.of, ("step", "weights"))
        at_least("radius", self.radius, 0.0, float, above=True)


class NormalisedReptile(Reptile):
    """Reptile whose tasks all have the same say."""

    title = "Reptile with normalised aggregation ([Nichol et al. 2018](https://arxiv.org/abs/1803.02999))"
    Options = NormalisedOptions

    def displacement(self, params: Params, state: Params) -> dict[str, Tensor]:
        start = {name: value for name, value in params.items() if name in state}
        if self.options.of == "weights":
            length = _norm(start.values()) / _norm(state[name] for name in start)
            return {name: value - length * state[name] for name, value in start.items()}
        step = super().displacement(params, state)
        length = _norm(step[name] for name in start)
        # A step of no length has no direction, and stays nothing.
        scale = self.options.radius / length.where(length > 0, torch.ones_like(length))
        return {name: scale * value for name, value in step.items()}


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()
