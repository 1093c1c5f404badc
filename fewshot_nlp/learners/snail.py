"""SNAIL: Mishra, Rohaninejad, Chen and Abbeel, A Simple Neural Attentive Meta-Learner, ICLR 2018 (arXiv:1707.03141).

An episode is a sequence, the support examples with their labels and then one query without, and the answer is read off
its last position. ``C`` channels at a position grow block by block, as each block's output is put beside its input::

    attention     a_t = Σ_{i<t} softmax_i(q_t · k_i / √d) v_i                           C -> C + value_size
    dense block   a_t = tanh(U [x_{t-δ}; x_t]) ∘ sigmoid(V [x_{t-δ}; x_t])              C -> C + filters
    TC block      dense blocks of δ = 1, 2, 4 … until they reach ``sequence_length`` positions back
    network       attention, TC block, attention, TC block, attention, and a linear map to the answer

The paper writes the label as one of N, which ties the network to N classes in one order. Here every class has a
sequence of its own, in which the label is "of this class" ``(1, 0)``, "of another" ``(0, 1)`` or unknown ``(0, 0)``,
and the answer is this class's logit, with the same weights for all: ``[n_way, n + 1, hidden_size + 2]``. Each query has
sequences of its own, too. As all is causal, they share their first n positions, which are computed once.

Two small changes to attention: a position reads those before it and not itself, which stands beside what is read
anyway; and it may read nothing, a zero key with a zero value, as the first one must. The first attention starts as that
of matching networks, ``s cos(f, f')`` on unit features, and the last map at the weight that falls on the class, so that
an untrained SNAIL answers ``s Σ_{i of the class} a_i``. The order of the support set matters, by design.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot, pad

from fewshot_nlp.checks import at_least
from fewshot_nlp.learners.base import BaseLearner
from fewshot_nlp.models.heads import SCALE
from fewshot_nlp.types import Batch, Params, State

#: A sequence's first positions ``[classes, n, C]``, and the last ones ``[classes, queries, C]``, each alone after them.
Sequence = tuple[Tensor, Tensor]


@dataclass
class SNAILOptions:
    """``key_size``, ``value_size``: of attention; the first one's keys are of the features' size. ``filters``: of a
    dense block. ``sequence_length``: how far back the convolutions reach; attention reaches the whole of any sequence.
    """

    key_size: int = 64
    value_size: int = 32
    filters: int = 32
    sequence_length: int = 26

    def __post_init__(self) -> None:
        for name, low in (("key_size", 1), ("value_size", 1), ("filters", 1), ("sequence_length", 2)):
            at_least(name, getattr(self, name), low)


class SNAIL(BaseLearner):
    """Temporal convolutions and causal attention over the episode; ``head_scale`` is the scale ``s``."""

    title = "SNAIL ([Mishra et al. 2018](https://arxiv.org/abs/1707.03141))"
    fast_body = False
    starts_head = False
    implied: ClassVar = {"distance": "cosine"}
    Options = SNAILOptions

    def build_networks(self) -> dict[str, nn.Module]:
        return {"network": _Network(self.model.hidden_size, self.options, self.config.logit_scale)}

    def _adapt(self, params: Params, support: Batch) -> State:
        features = self.features(params, support.inputs)
        return {"support": features, "member": one_hot(support.labels, support.n_way).to(features.dtype)}

    def predict(self, params: Params, state: State, query: Batch) -> Tensor:
        features, member = self.features({**params, **state}, query.inputs), state["member"].T[..., None]
        past = torch.cat([_spread(state["support"], len(member)), member, 1 - member], dim=-1)
        last = pad(_spread(features, len(member)), (0, 2))
        return params[SCALE].exp() * self.networks("network", params, past, last).T


def _spread(features: Tensor, n_way: int) -> Tensor:
    """Features of unit mean square, ``[n, size]``, for each class: ``[n_way, n, size]``."""
    return (features.shape[-1] ** 0.5 * normalize(features, dim=-1)).expand(n_way, -1, -1)


class _Attention(nn.Module):
    """``size`` channels become ``size + value_size``."""

    def __init__(self, size: int, key_size: int, value_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(size, key_size)
        # A key's bias would drop out of the softmax, but for the key of nothing.
        self.key = nn.Linear(size, key_size, bias=False)
        self.value = nn.Linear(size, value_size)

    def forward(self, past: Tensor, last: Tensor) -> Sequence:
        # Nothing stands before the first: [classes, 1 + n, ...].
        key, value = (pad(each(past), (0, 0, 1, 0)) for each in (self.key, self.value))
        n = past.shape[1]
        later = torch.ones(n, n + 1, dtype=torch.bool, device=past.device).triu(1)
        return self._beside(past, key, value, later), self._beside(last, key, value, torch.zeros_like(later[:1]))

    def _beside(self, x: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        scores = self.query(x) @ key.mT * key.shape[-1] ** -0.5
        return torch.cat([x, scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value], dim=-1)


class _Dense(nn.Module):
    """A gated causal convolution of kernel 2: ``size`` channels become ``size + filters``."""

    def __init__(self, size: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.convolution = nn.Linear(2 * size, 2 * filters)

    def forward(self, past: Tensor, last: Tensor) -> Sequence:
        n = past.shape[1]
        earlier = pad(past, (0, 0, self.dilation, 0))
        return self._beside(past, earlier[:, :n]), self._beside(last, earlier[:, n : n + 1].expand_as(last))

    def _beside(self, x: Tensor, earlier: Tensor) -> Tensor:
        candidate, gate = self.convolution(torch.cat([earlier, x], dim=-1)).chunk(2, dim=-1)
        return torch.cat([x, candidate.tanh() * gate.sigmoid()], dim=-1)


class _Network(nn.Module):
    """From ``size`` features and two labels at each position to the answer at the last, ``[classes, queries]``."""

    def __init__(self, size: int, options: SNAILOptions, scale: float) -> None:
        super().__init__()
        reach = (options.sequence_length - 1).bit_length()
        channels = size + 2
        blocks: list[nn.Module] = []
        for key_size, convolutions in ((size, reach), (options.key_size, reach), (options.key_size, 0)):
            blocks.append(_Attention(channels, key_size, options.value_size))
            channels += options.value_size
            for i in range(convolutions):
                blocks.append(_Dense(channels, options.filters, 2**i))
                channels += options.filters
        self.blocks = nn.ModuleList(blocks)
        # A bias would be the same for every class.
        self.answer = nn.Linear(channels, 1, bias=False)
        first = blocks[0]
        assert isinstance(first, _Attention)
        self._start_as_matching(first, size, scale)

    @torch.no_grad()
    def _start_as_matching(self, first: _Attention, size: int, scale: float) -> None:
        for each in (first.query, first.key):
            nn.init.eye_(each.weight).mul_((scale * size**-0.5) ** 0.5)
        nn.init.zeros_(first.query.bias)
        # Its first value is the label "of this class"; the answer is what is read of it.
        for tensor in (first.value.weight[0], first.value.bias[:1], self.answer.weight):
            nn.init.zeros_(tensor)
        first.value.weight[0, size] = 1
        self.answer.weight[0, size + 2] = 1

    def forward(self, past: Tensor, last: Tensor) -> Tensor:
        for block in self.blocks:
            past, last = block(past, last)
        return self.answer(last).squeeze(-1)
