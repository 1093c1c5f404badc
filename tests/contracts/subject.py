"""What the learners' contract is tried on: a line of its table, made ready, and what counts as the same answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fewshot_nlp.types import Batch, Episode, Learner, State
from tests.tiny import random_batch, random_episode

#: Support examples of each class: one shot, five shots, unequal counts.
COUNTS = {"1-shot": (1, 1, 1), "5-shot": (5, 5, 5), "unequal": (1, 4, 2, 1)}
#: Chosen with no fixed point, so that a learner that ignores it cannot pass.
TURN = {3: [1, 2, 0], 4: [1, 2, 3, 0]}


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        build: makes the learner, with its own untrained parameters, from the folder of a backbone.
        trained: it has meta-parameters and a meta-gradient. One that has none is built in float64.
        exact: its meta-gradient is the derivative of the query loss through adaptation.
        saved: ``FewShotAdapter`` can save it, as ``config.learner`` names its class.
        ordered: the order of the support set matters by design, as in SNAIL.
        kinds: inputs that it is tried on: text, vectors, images.
        loss: what it trains, of logits and labels.
        task: what it is to learn, as ``config.task``.
        names: it is given the names of the classes.
        silent: how the names of parameters begin that serve training alone and have no say in the answers.
    """

    build: Callable[[str], Learner]
    trained: bool = True
    exact: bool = True
    saved: bool = True
    ordered: bool = False
    kinds: tuple[str, ...] = ("text",)
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    task: str = "classification"
    names: bool = False
    silent: str | None = None


class Subject:
    """A learner of the table in float64, away from its start, and tasks of one shape for it.

    Args:
        entry: the learner.
        folder: of its backbone.
        counts: support examples of each class.
        kind: what the backbone takes: ``"text"``, ``"image"`` or ``"vector"``.
    """

    def __init__(self, entry: Entry, folder: str, counts: tuple[int, ...], kind: str = "text") -> None:
        self.entry, self.folder, self.counts, self.kind = entry, folder, counts, kind
        self.learner = self.build()
        rng = torch.Generator().manual_seed(1)
        # Away from starts such as LoRA's zero, where half of the gradients vanish.
        self.params = {
            name: value.double() + 0.1 * torch.randn(value.shape, generator=rng, dtype=torch.float64)
            for name, value in self.learner.init_params().items()
        }
        self.first, self.second = (self.episode(seed) for seed in (0, 1))

    def batch(self, counts: Sequence[int], seed: int) -> Batch:
        return random_batch(list(counts), seed, kind=self.kind, task=self.entry.task)

    def episode(self, seed: int, dtype: torch.dtype = torch.float64) -> Episode:
        shape = {"kind": self.kind, "dtype": dtype, "task": self.entry.task, "names": self.entry.names}
        return random_episode(list(self.counts), seed=seed, **shape)

    def build(self) -> Any:
        learner: Any = self.entry.build(self.folder)
        if self.entry.trained:
            learner.model.module.double()
        return learner

    def answer(self, support: Batch | None = None, query: Batch | None = None, learner: Any = None) -> Tensor:
        """Logits of the first episode, with parts of it replaced."""
        learner = learner or self.learner
        state = learner.adapt(self.params, support or self.first.support)
        return learner.predict(self.params, state, query or self.first.query).detach()


def rows(batch: Batch, index: list[int]) -> Batch:
    """Some rows of a batch, in a given order."""
    return replace(batch, inputs={n: v[index] for n, v in batch.inputs.items()}, labels=batch.labels[index])


def tensors(state: State) -> Iterator[Tensor]:
    """Every tensor in a nest of containers."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        yield from (tensor for value in state.values() for tensor in tensors(value))
    elif isinstance(state, list | tuple):
        yield from (tensor for value in state for tensor in tensors(value))


def same(found: Tensor, expected: Tensor) -> None:
    # Adam divides rounding errors by 1e-8 where a gradient is zero.
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def differ(found: Tensor, other: Tensor) -> None:
    assert (found - other).abs().max() > 1e-4, "these should differ"
