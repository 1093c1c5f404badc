"""Recurrent relational networks: Palm, Paquet and Winther, NeurIPS 2018 (arXiv:1711.08028), over an episode.

The nodes of a graph are the ``n`` support examples and one query; every query has a graph of its own, so that queries
do not see each other. From features ``f_i`` scaled to a mean square of one, ``x_i = h_i^0 = silu(W f_i)`` ``[width]``,
``steps`` rounds of messages pass along all edges, with shared weights::

    m_i = Σ_k mean_{j: k(i, j) = k} M silu(U h_i + V h_j + e_k(i, j)),   h_i, s_i = LSTM([x_i, m_i], (h_i, s_i))
    r_c = mean_{i: y_i = c} w · silu(R [h_i, h_query, h_i ∘ h_query]),   logit_c = s · r_c + (the head's similarity)

Labels enter through the kind ``k`` of an edge alone: same class (a node's own edge included), other class, from the
query, to the query. So classes are alike, and any number of them will do. The last line reads states that are scaled to
a mean square of one, too: those of a new LSTM are small, and their product would tell nothing. ``w`` starts at zero, so
that an untrained learner answers as prototypes do.

Unlike the paper: its graphs have one degree and sum messages, while the mean over each kind of edge has the same scale
for any way and shot (as in relational graph convolutions, Schlichtkrull et al. 2018, arXiv:1703.06103); it adds the
loss of every round, while here the rounds are few and the last one's counts; ``silu`` stands for its ``relu``, as among
so many edges some unit is always at a kink, where there is no slope.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad, rms_norm, silu

from fewshot_nlp.checks import at_least
from fewshot_nlp.learners.base import BaseLearner
from fewshot_nlp.learners.matching import MEMBER, MEMORY
from fewshot_nlp.models.heads import SCALE
from fewshot_nlp.types import Batch, Params, State

#: Kinds of edges.
SAME, OTHER, FROM_QUERY, TO_QUERY = range(4)
#: Edges that are worked on together: 2^20 of 64 numbers are 256 MB.
EDGES_AT_ONCE = 2**20


@dataclass
class RelationalOptions:
    """``steps``: rounds of messages; ``width``: numbers in a node's state and in a message."""

    steps: int = 3
    width: int = 64

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("width", self.width, 1)


class RelationalNetwork(nn.Module):
    """Scores ``[m, n_way]`` of ``m`` queries by message passing; ``size`` is that of a feature."""

    def __init__(self, size: int, width: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.node = nn.Linear(size, width)
        self.receiver = nn.Linear(width, width, bias=False)
        self.sender = nn.Linear(width, width, bias=False)
        self.kind = nn.Embedding(4, width)
        self.message = nn.Linear(width, width)
        self.update = nn.LSTMCell(2 * width, width)
        self.compare = nn.Linear(3 * width, width)
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, support: Tensor, member: Tensor, queries: Tensor) -> Tensor:
        """From ``support`` ``[n, size]`` of the classes ``member`` ``[n, n_way]`` and ``queries`` ``[m, size]``."""
        kinds, shares = edges(member)
        count = max(1, EDGES_AT_ONCE // kinds.numel())
        return torch.cat([self._scores(support, member, kinds, shares, part) for part in queries.split(count)])

    def _scores(self, support: Tensor, member: Tensor, kinds: Tensor, shares: Tensor, queries: Tensor) -> Tensor:
        support, queries = (silu(self.node(rms_norm(each, each.shape[-1:]))) for each in (support, queries))
        nodes = torch.cat([support.expand(len(queries), -1, -1), queries[:, None]], dim=1)
        kind, shares = self.kind(kinds), shares.to(nodes.dtype)
        hidden, cell = nodes, torch.zeros_like(nodes)
        for _ in range(self.steps):
            pairs = silu(self.receiver(hidden)[:, :, None] + self.sender(hidden)[:, None] + kind)
            # A linear map of a mean is the mean of the maps, and is of n numbers rather than n².
            messages = self.message(torch.einsum("ij,mijw->miw", shares, pairs))
            inputs = torch.cat([nodes, messages], dim=-1)
            flat = self.update(inputs.flatten(0, 1), (hidden.flatten(0, 1), cell.flatten(0, 1)))
            hidden, cell = (each.unflatten(0, nodes.shape[:2]) for each in flat)
        hidden = rms_norm(hidden, hidden.shape[-1:])
        examples, query = hidden[:, :-1], hidden[:, -1:]
        both = torch.cat([examples, query.expand_as(examples), examples * query], dim=-1)
        scores = self.score(silu(self.compare(both))).squeeze(-1)
        member = member.to(scores.dtype)
        return scores @ (member / member.sum(dim=0))


class Relational(BaseLearner):
    """Each query reasons with the support examples in rounds of messages."""

    title = "recurrent relational networks ([Palm et al. 2018](https://arxiv.org/abs/1711.08028))"
    fast_body = False
    implied: ClassVar = {"head": "prototype"}
    Options = RelationalOptions

    def build_networks(self) -> dict[str, nn.Module]:
        return {"graph": RelationalNetwork(self.model.hidden_size, self.options.width, self.options.steps)}

    def _adapt(self, params: Params, support: Batch) -> State:
        features = self.features(params, support.inputs)
        centres = self.head.start(params, features, support.labels, support.n_way)
        return {**centres, MEMORY: features, MEMBER: one_hot(support.labels, support.n_way).bool()}

    def predict(self, params: Params, state: State, query: Batch) -> Tensor:
        features = self.features({**params, **state}, query.inputs)
        scores = self.networks("graph", params, state[MEMORY], state[MEMBER], features)
        return self.head.logits(params, state, features) + params[SCALE].exp() * scores


def edges(member: Tensor) -> tuple[Tensor, Tensor]:
    """Kinds of the edges ``[n + 1, n + 1]`` to each node (row) from each (column), the query last; and for each edge
    one over the number of those of its kind to that node."""
    same = (member[:, None] & member[None]).any(dim=-1)
    kinds = pad((~same).long() * OTHER, (0, 1, 0, 1), value=SAME)
    kinds[:-1, -1], kinds[-1, :-1] = FROM_QUERY, TO_QUERY
    counts = one_hot(kinds, 4).sum(dim=1)
    return kinds, 1 / counts.gather(1, kinds)
