"""Meta-LSTM: Ravi and Larochelle, Optimization as a Model for Few-Shot Learning, ICLR 2017 (no arXiv number).

A learned update rule: the cell state of an LSTM is the learner's parameters ``θ`` ``[N]``, and its gates decide how
much of them to keep and how far to follow the gradient ``∇`` of the support loss ``S``. All ``N`` coordinates share one
LSTM and have states of their own::

    x_t = [pre(∇_t), pre(S_t)]                                   [N, 4]
    h_t, m_t = LSTM(x_t, h_{t-1}, m_{t-1})                       [N, hidden_size]
    i_t = σ(W_I [h_t, θ_{t-1}, i_{t-1}] + b_I + logit α)         [N]
    f_t = σ(W_F [h_t, θ_{t-1}, f_{t-1}] + b_F)                   [N]
    θ_t = f_t ∘ θ_{t-1} - i_t ∘ ∇_t

    pre(x) = (log|x| / p, sgn x)  if |x| >= e^-p  else  (-1, e^p x),   p = 10

The start ``θ_0`` (the adapter) and the LSTM are meta-learned. As in the paper's experiments the LSTM has two layers, an
ordinary one below; with ``hidden_size=0`` the gates read ``x_t`` itself, as its equations have it. ``α`` is the inner
step size of the adapter or the head: biases start at 0 and ``forget_bias``, so that the untrained rule is close to
gradient descent. The paper neglects that ``∇`` and ``S`` depend on the start, which is ``estimator="first_order"``,
the default; ``"exact"`` does not. Its head starts at learned weights for a fixed number of classes; here it starts
where ``head_init`` says, which favours no class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fewshot_nlp.checks import at_least
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.rules import Point, Rule, Slots, Updates, by_prefix
from fewshot_nlp.learners.gradient import GradientLearner
from fewshot_nlp.models.model import FewShotModel
from fewshot_nlp.types import Params

#: Where the two ways of looking at a number meet: at ``e^-P``.
P = 10.0


def preprocess(numbers: Tensor) -> Tensor:
    """Size and sign of ``numbers`` ``[...]`` over many orders of magnitude, ``[..., 2]`` (Andrychowicz et al. 2016)."""
    size = numbers.abs()
    large = size >= math.exp(-P)
    log = size.where(large, torch.ones_like(size)).log()
    return torch.stack([(log / P).where(large, -1), numbers.sign().where(large, math.exp(P) * numbers)], dim=-1)


@dataclass
class MetaLSTMOptions:
    """``hidden_size``: of the lower LSTM, 0 leaves it out; ``forget_bias``: start of ``b_F``, 4 to 6 in the paper."""

    hidden_size: int = 20
    forget_bias: float = 6.0

    def __post_init__(self) -> None:
        at_least("hidden_size", self.hidden_size, 0)
        at_least("forget_bias", self.forget_bias, 0.0, float)


class Gates(nn.Module):
    """The LSTM of all coordinates, with the small random weights that the paper starts from."""

    def __init__(self, hidden_size: int, forget_bias: float) -> None:
        super().__init__()
        self.lower = nn.LSTMCell(4, hidden_size) if hidden_size else None
        self.input, self.forget = (nn.Linear((hidden_size or 4) + 2, 1) for _ in range(2))
        for weight in self.parameters():
            nn.init.uniform_(weight, -0.01, 0.01)
        nn.init.zeros_(self.input.bias)
        nn.init.constant_(self.forget.bias, forget_bias)

    def forward(self, seen: Tensor, theta: Tensor, slots: Slots, rates: Tensor) -> Slots:
        """The next slots.

        Args:
            seen: ``[N, 4]``, gradients and loss.
            theta: ``[N]``, parameters.
            slots: ``input`` and ``forget`` ``[N]``; ``hidden`` and ``cell`` ``[N, hidden_size]`` of the lower LSTM.
            rates: ``[N]``, what is added to the bias of the input gate.
        """
        after: Slots = {}
        if self.lower is not None:
            # Torch's own cell is one operation that torch.vmap cannot take.
            lower = self.lower
            given = linear(seen, lower.weight_ih, lower.bias_ih) + linear(
                slots["hidden"], lower.weight_hh, lower.bias_hh
            )
            let_in, keep, new, out = given.chunk(4, dim=-1)
            after["cell"] = keep.sigmoid() * slots["cell"] + let_in.sigmoid() * new.tanh()
            after["hidden"] = seen = out.sigmoid() * after["cell"].tanh()
        for name, gate, more in (("input", self.input, rates), ("forget", self.forget, 0.0)):
            given = torch.cat([seen, torch.stack([theta, slots[name]], dim=-1)], dim=-1)
            after[name] = torch.sigmoid(gate(given).squeeze(-1) + more)
        return after


class MetaLSTM(GradientLearner):
    """A learned rule for the inner loop, the same for every coordinate, and a learned start."""

    title = "Meta-LSTM ([Ravi and Larochelle 2017](https://openreview.net/forum?id=rJY0-Kcll))"
    estimator = "first_order"
    implied: ClassVar = {"inner_rule": "sgd", "inner_weight_decay": 0.0, "inner_max_grad_norm": None}
    Options = MetaLSTMOptions

    def __init__(self, config: FewShotConfig, model: FewShotModel) -> None:
        super().__init__(config, model)
        config = self.config
        if self.estimator_name in ("implicit", "reptile"):
            raise ValueError(
                f"estimator={self.estimator_name!r} looks at the end of the inner loop alone, and learner='meta_lstm' "
                f"learns its steps. Use estimator='first_order', 'exact' or 'truncated'."
            )
        for rate in self.rates.values():
            if not 0 < rate < 1:
                raise ValueError(
                    f"An inner step size of {rate} is out of range: learner='meta_lstm' starts its input gate there. "
                    f"Set inner_learning_rate and head_learning_rate between 0 and 1."
                )
        self.rule = Rule(self._slots, self._update)

    def build_networks(self) -> dict[str, nn.Module]:
        return {"gates": Gates(self.options.hidden_size, self.options.forget_bias)}

    def _slots(self, fast: Params) -> Slots:
        """The gates and the lower LSTM before the first step, zero."""
        some, size = next(iter(fast.values())), self.options.hidden_size
        count = sum(value.numel() for value in fast.values())
        lower = {name: some.new_zeros(count, size) for name in ("hidden", "cell")} if size else {}
        return {**{name: some.new_zeros(count) for name in ("input", "forget")}, **lower}

    def _update(self, grads: Updates, slots: Slots, point: Point) -> tuple[Updates, Slots]:
        assert point.loss is not None
        sizes = [value.numel() for value in grads.values()]
        gradient, theta = (torch.cat([part[n].flatten() for n in grads]) for part in (grads, point.fast))
        rates = torch.cat([g.new_full((g.numel(),), _logit(by_prefix(self.rates, n))) for n, g in grads.items()])
        loss = preprocess(point.loss.to(gradient.dtype)).expand(len(gradient), 2)
        seen = torch.cat([preprocess(gradient), loss], dim=-1)
        slots = self.networks("gates", point.params, seen, theta, slots, rates)
        steps = ((slots["forget"] - 1) * theta - slots["input"] * gradient).split(sizes)
        return {n: step.view_as(grads[n]) for n, step in zip(grads, steps, strict=True)}, slots


def _logit(rate: float) -> float:
    return math.log(rate / (1 - rate))
