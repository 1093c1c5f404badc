"""Matching networks: Vinyals et al., Matching Networks for One Shot Learning, NeurIPS 2016 (arXiv:1606.04080).

A query ``x̂`` attends over all support examples ``x_i``, ``[n_query, n]``, and a class gets the attention of its own::

    a(x̂, x_i) = softmax_i s · cos(f(x̂), g(x_i)),   P(c | x̂) = Σ_{i: y_i = c} a(x̂, x_i),   logits = log P

The scale ``s`` is learned; with one example a class this is the prototypical network. As in the paper a class with more
examples than another collects more attention.

In the plain form ``f`` and ``g`` are the features themselves, ``f'`` and ``g'``, ``[n, size]``. With ``full_context``
(the paper's appendices A.1 and A.2) both depend on the whole support set: ``g`` by a bidirectional LSTM through it,
whose states are ``a_i`` and ``b_i``; ``f`` by an LSTM that starts at ``h_0 = f'(x̂)`` and reads it ``processing_steps``
times, ``K``::

    g(x_i) = a_i + b_i + g'(x_i)
    r_k = Σ_i softmax_i(h_k · g(x_i)) g(x_i),   ĥ_{k+1}, c_{k+1} = LSTM(f'(x̂), [h_k, r_k], c_k)
    h_{k+1} = ĥ_{k+1} + f'(x̂),   f(x̂) = h_K

The order of the support set then matters, by design. Nothing enters the cells of both LSTMs at the start, so that their
states are zero and an untrained learner answers as the plain form does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fewshot_nlp.checks import at_least
from fewshot_nlp.learners.base import BaseLearner
from fewshot_nlp.models.heads import WEIGHT
from fewshot_nlp.types import Batch, Params, State

MEMORY = "support.features"
MEMBER = "support.member"


@dataclass
class MatchingOptions:
    """``full_context``: features that depend on the whole support set; ``processing_steps``: times a query reads it."""

    full_context: bool = False
    processing_steps: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.full_context, bool):
            raise ValueError(f"full_context={self.full_context!r} must be true or false.")
        at_least("processing_steps", self.processing_steps, 1)


class SupportContext(nn.Module):
    """``g``: a bidirectional LSTM through the support features ``[n, size]``, added to them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(size, size, bidirectional=True)
        _silence(self.lstm.parameters())

    def forward(self, features: Tensor) -> Tensor:
        forwards, backwards = self.lstm(features)[0].chunk(2, dim=-1)
        return features + forwards + backwards


class QueryContext(nn.Module):
    """``f``: each of the query features ``[n_query, size]`` alone reads ``memory`` ``[n, size]``, ``steps`` times."""

    def __init__(self, size: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.cell = nn.LSTMCell(2 * size, size)
        _silence(self.cell.parameters())

    def forward(self, features: Tensor, memory: Tensor) -> Tensor:
        hidden, cell = features, torch.zeros_like(features)
        for _ in range(self.steps):
            read = (hidden @ memory.T).softmax(dim=-1) @ memory
            output, cell = self.cell(torch.cat([features, read], dim=-1), (hidden, cell))
            hidden = output + features
        return hidden


class Matching(BaseLearner):
    """Attention over the support examples; with ``full_context`` their order matters."""

    title = "matching networks ([Vinyals et al. 2016](https://arxiv.org/abs/1606.04080))"
    fast_body = False
    implied: ClassVar = {"head": "prototype"}
    starts_head = False
    Options = MatchingOptions

    def build_networks(self) -> dict[str, nn.Module]:
        if not self.options.full_context:
            return {}
        size = self.model.hidden_size
        return {"support": SupportContext(size), "query": QueryContext(size, self.options.processing_steps)}

    def _adapt(self, params: Params, support: Batch) -> State:
        features = self.features(params, support.inputs)
        if self.options.full_context:
            features = self.networks("support", params, features)
        return {MEMORY: features, MEMBER: one_hot(support.labels, support.n_way).bool()}

    def predict(self, params: Params, state: State, query: Batch) -> Tensor:
        features, memory = self.features({**params, **state}, query.inputs), state[MEMORY]
        if self.options.full_context:
            features = self.networks("query", params, features, memory)
        # To the head each example is a class of its own.
        attention = self.head.logits(params, {WEIGHT: memory}, features).log_softmax(dim=-1)
        others = ~state[MEMBER].T
        return attention[:, None].masked_fill(others, -torch.inf).logsumexp(dim=-1)


@torch.no_grad()
def _silence(parameters: Iterable[Tensor]) -> None:
    """Let an LSTM answer zero: the third of its four gates' rows, in torch's order, is what enters its cell."""
    for parameter in parameters:
        parameter.chunk(4)[2].zero_()
