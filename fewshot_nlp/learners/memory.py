"""An external memory of past tasks: classes that were met before help to place those of a new task.

After Kaiser et al., Learning to Remember Rare Events, ICLR 2017 (arXiv:1703.03129), whose bounded key-value memory is
written after every batch; what is read corrects a class mean as in Yang et al., Free Lunch for Few-shot Learning, ICLR
2021 (arXiv:2101.06395), and the centre of the features as in SimpleShot (Wang et al. 2019, arXiv:1911.04623).

An entry is a class of a finished task: its mean ``v_m`` over support and query, and its task's description ``t_m``,
both ``[size]``. A description is the mean of the names' features where the names of the classes are given
(``use_label_names``), or else that of the support features. Features ``f`` are of unit length. A new task with
description ``t``, class means ``c_n`` and ``K_n`` support examples of class ``n`` retrieves the ``neighbours`` nearest
entries ``r_m``, weighs them by their tasks, moves the origin into their midst, and lets each of its classes attend to
them as to ``κ`` further examples::

    r_m  = cos(t, t_m) + max_n cos(c_n, v_m)
    w_m  = softmax_m(α cos(t, t_m)),              o  = β Σ_m w_m v_m
    a_nm = softmax_m(γ cos(c_n - o, v_m - o) + log w_m)
    c'_n = (K_n c_n + κ Σ_m a_nm v_m) / (K_n + κ),   logits = s cos(f - o, c'_n - o)

``α, β, γ, κ`` are learned. With an empty memory ``c' = c`` and ``o = 0``: prototypical networks.

A finished task writes its classes to the front; a class met again is averaged in (``rate``), and beyond ``capacity``
the one that was longest unseen is forgotten. The memory is tensors named ``memory.``, saved with the adapter: data,
which no gradient changes. In a meta-gradient a task's own classes are hidden from it, as a new task's are not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from fewshot_nlp.checks import at_least
from fewshot_nlp.functional.call import full_precision
from fewshot_nlp.learners.base import BaseLearner
from fewshot_nlp.models.heads import WEIGHT, class_means
from fewshot_nlp.types import OUT_OF_SCOPE, Batch, Episode, EpisodeSpec, MetaGrad, Params, State

MEANS = "memory.means"
TASKS = "memory.tasks"
#: A number for each class, by which it is known again.
CLASSES = "memory.classes"
#: In the state of a task: where the features' origin is moved to.
CENTRE = "centre"


@dataclass
class MemoryOptions:
    """``capacity``: classes remembered; ``neighbours``: how many of them a task retrieves; ``rate``: weight of what is
    new of a class met again."""

    capacity: int = 256
    neighbours: int = 32
    rate: float = 0.3

    def __post_init__(self) -> None:
        at_least("capacity", self.capacity, 1)
        at_least("neighbours", self.neighbours, 1)
        at_least("rate", self.rate, 0.0, float, above=True)
        if self.rate > 1:
            raise ValueError(f"rate={self.rate!r} is out of range. Use a value above 0 and up to 1.")


class Retrieval(nn.Module):
    """What is learned of reading: ``log α``, ``β``, ``log γ`` and ``log κ``."""

    def __init__(self) -> None:
        super().__init__()
        self.log_task_scale = nn.Parameter(torch.tensor(2.0))
        self.centring = nn.Parameter(torch.tensor(0.5))
        self.log_class_scale = nn.Parameter(torch.tensor(2.0))
        self.log_count = nn.Parameter(torch.tensor(-2.0))

    def forward(
        self, task: Tensor, centres: Tensor, counts: Tensor, tasks: Tensor, means: Tensor, neighbours: int
    ) -> tuple[Tensor, Tensor]:
        """The new class means ``[n_way, size]`` and the centre ``[size]``.

        Args:
            task: description ``[size]``.
            centres: class means ``[n_way, size]``; ``counts``: of how many examples, ``[n_way]``.
            tasks, means: of the memory, ``[capacity, size]``; an entry of zeros is empty.
            neighbours: entries to retrieve.
        """
        near = tasks @ task
        filled = means.abs().sum(dim=1) > 0
        # The classes of one task are equally near to any other: which of them are alike decides between them.
        reach = near + (normalize(centres, dim=-1) @ means.T).amax(dim=0)
        found = reach.masked_fill(~filled, -torch.inf).topk(min(neighbours, len(means))).indices
        near, means, filled = near[found], means[found], filled[found]
        weights = _softmax(self.log_task_scale.exp() * near, filled)
        centre = self.centring * (weights @ means)
        alike = normalize(centres - centre, dim=-1) @ normalize(means - centre, dim=-1).T
        # The tiny number stands for an empty entry's zero, whose logarithm has no derivative.
        scores = self.log_class_scale.exp() * alike + weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
        attention = _softmax(scores, filled.expand_as(scores))
        extra = self.log_count.exp() * filled.any()
        counts = counts[:, None]
        return (counts * centres + extra * (attention @ means)) / (counts + extra), centre


def _softmax(scores: Tensor, filled: Tensor) -> Tensor:
    """Over the last dimension, of the filled entries alone; zero where there is none."""
    weights = (scores - scores.detach().amax(dim=-1, keepdim=True)).exp() * filled
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


class Memory(BaseLearner):
    """Class means that retrieved classes of past tasks centre and correct; the adapter is trained around them."""

    title = "an external memory of past tasks ([Kaiser et al. 2017](https://arxiv.org/abs/1703.03129))"
    fast_body = False
    reads_names = True
    implied: ClassVar = {"head": "prototype"}
    remembered: ClassVar = frozenset({MEANS, TASKS, CLASSES})
    Options = MemoryOptions

    def build_networks(self) -> dict[str, nn.Module]:
        return {"retrieval": Retrieval()}

    def init_params(self) -> dict[str, Tensor]:
        params = super().init_params()
        shape = self.options.capacity, self.model.hidden_size
        empty = torch.zeros(shape, device=self.model.device, dtype=self.model.dtype)
        return {**params, MEANS: empty, TASKS: empty.clone(), CLASSES: empty[:, 0].clone()}

    def _adapt(self, params: Params, support: Batch) -> State:
        features, labels, task = self._read(params, support)
        counts = one_hot(labels, support.n_way).sum(dim=0).to(features.dtype)
        means, tasks = normalize(params[MEANS], dim=-1), normalize(params[TASKS], dim=-1)
        centres = class_means(features, labels, support.n_way)
        found, centre = self.networks("retrieval", params, task, centres, counts, tasks, means, self.options.neighbours)
        return {WEIGHT: found - centre, CENTRE: centre}

    def predict(self, params: Params, state: State, query: Batch) -> Tensor:
        features = normalize(self.features(params, query.inputs), dim=-1)
        return self.head.logits(params, state, features - state[CENTRE])

    def remember(self, params: Params, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        """The entries ``memory.`` after ``episodes``, in this order, are finished; ``params`` stay what they are."""
        memory = {name: params[name] for name in self.remembered}
        with torch.no_grad():
            for episode in episodes:
                memory = self._written(params, memory, episode)
        return memory

    def _written(self, params: Params, memory: Params, episode: Episode) -> dict[str, Tensor]:
        features, labels, task = self._read(params, episode.support)
        known = episode.query.labels != OUT_OF_SCOPE
        answered = normalize(self.features(params, episode.query.inputs), dim=-1)[known]
        labels = torch.cat([labels, episode.query.labels[known]])
        n_way = episode.support.n_way
        means = class_means(torch.cat([features, answered]), labels, n_way)
        classes = _numbers(episode.spec).to(memory[CLASSES])
        # Empty entries have the number 0, which no class has.
        same = (classes[:, None] == memory[CLASSES]).to(means.dtype)
        with full_precision(means):
            old, rate = same @ memory[MEANS], self.options.rate
        means = torch.where(same.any(dim=1, keepdim=True), torch.lerp(old, means, rate), means)
        new = {MEANS: means, TASKS: task.expand(n_way, -1), CLASSES: classes}
        left = ~same.any(dim=0)
        size = self.options.capacity
        return {name: torch.cat([rows, memory[name][left]])[:size] for name, rows in new.items()}

    def _read(self, params: Params, support: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features of the support examples, names among them; their labels; the task's description."""
        whole = support.with_names_as_examples(self.config.label_name_weight)
        features = normalize(self.features(params, whole.inputs), dim=-1)
        told = features[len(support) :]
        return features, whole.labels, normalize((told if len(told) else features).mean(dim=0), dim=-1)

    def _episode_grad(self, params: Params, episode: Episode) -> MetaGrad:
        own = torch.isin(params[CLASSES], _numbers(episode.spec).to(params[CLASSES]))
        hidden = {**params, MEANS: params[MEANS].masked_fill(own[:, None], 0)}
        part = super()._episode_grad(hidden, episode)
        data = {name: torch.zeros_like(params[name]) for name in self.remembered}
        return replace(part, grads={**part.grads, **data})


def _numbers(spec: EpisodeSpec) -> Tensor:
    """A number above 0 for each class that float32 holds exactly, ``[n_way]``."""
    hashes = (hashlib.sha256(f"{spec.pool}/{name}".encode()).digest() for name in spec.classes)
    return torch.tensor([1 + int.from_bytes(each[:3], "big") % (2**24 - 1) for each in hashes])
