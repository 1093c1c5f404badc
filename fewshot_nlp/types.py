"""The values that flow through the framework, and the contract every learner keeps.

Data flows one way: data set -> pool -> spec -> episode -> batch -> learner -> gradient -> adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

#: Tensors by name. Names start with the owner: ``model.``, ``head.``, ``rule.``, ``learner.``, ``features.``, ``film.``
Params = Mapping[str, Tensor]

#: What a learner knows about one task after ``adapt``. Only the learner that made it reads it.
State = Any

#: How the inputs of a batch that is asked about names begin that hold the names.
NAMES = "names."

#: Label of a query example whose class is not in the episode.
OUT_OF_SCOPE = -1


def split_names(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of the texts themselves, and of the names that they are asked about, if they are (``Batch.asked``)."""
    texts = {name: rows for name, rows in inputs.items() if not name.startswith(NAMES)}
    return texts, {name.removeprefix(NAMES): rows for name, rows in inputs.items() if name not in texts}


@dataclass(frozen=True)
class EpisodeSpec:
    """The address of an episode: which classes, which rows. Small, hashable, and JSON-able.

    Attributes:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        index: position in the sampler's endless sequence.
        pool: name of the pool that the rows index into.
        classes: class names; position in this tuple is the episode label.
        support: rows of each class, one tuple a class, in the order of ``classes``.
        query: as ``support``, for the examples to answer.
        out_of_scope: query rows of classes outside the episode, labelled ``OUT_OF_SCOPE``.
    """

    split: str
    index: int
    pool: str
    classes: tuple[str, ...]
    support: tuple[tuple[int, ...], ...]
    query: tuple[tuple[int, ...], ...]
    out_of_scope: tuple[int, ...] = ()

    @property
    def n_way(self) -> int:
        return len(self.classes)

    @property
    def address(self) -> str:
        """Human-readable address, enough to replay the episode: ``pool/split/index``."""
        return f"{self.pool}/{self.split}/{self.index}"


@dataclass(frozen=True)
class Batch:
    """Model inputs and their labels.

    Attributes:
        inputs: what the backbone takes by keyword, each ``[n, ...]``; for text ``input_ids`` and
            ``attention_mask``, both ``[n, length]``.
        labels: ``[n]`` int64 in ``[0, n_way)``, or ``OUT_OF_SCOPE``; of a regression, ``[n]`` floats.
        n_way: number of classes of the task; 1 of a regression, whose answers are one number an example.
        names: the names of the classes in words, encoded as ``inputs`` are or as the encoder writes names, and to the
            same length, one row a class in the order of the labels; only of a support set, and only where the learner
            is to know them.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    n_way: int
    names: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        """Number of examples; of a stack of tasks, whose tensors have the tasks in front, of each task's."""
        return int(self.labels.shape[-1])

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda tensor: tensor.to(device))

    def recordable(self) -> Batch:
        """The same batch as autograd can record it, also where it was made in inference mode."""
        if not self.labels.is_inference():
            return self
        with torch.inference_mode(False):
            return self._map(torch.clone)

    def with_names_as_examples(self, weight: int) -> Batch:
        """The same batch with ``names`` as further examples, each of them ``weight`` times, and without ``names``."""
        if self.names is None:
            return self
        inputs = {name: torch.cat([rows, *[self.names[name]] * weight]) for name, rows in self.inputs.items()}
        labels = torch.arange(self.n_way, device=self.labels.device).repeat(weight)
        return Batch(inputs, torch.cat([self.labels, labels]), self.n_way)

    def asked(self, names: Mapping[str, Tensor]) -> Batch:
        """The same texts, each of them asked about ``names``, which are inputs then, too, one row a class."""
        return replace(self, inputs={**self.inputs, **{f"{NAMES}{name}": rows for name, rows in names.items()}})

    @property
    def names_asked(self) -> dict[str, Tensor]:
        """The inputs that hold the names which the texts are asked about, by their own names."""
        return {name: rows for name, rows in self.inputs.items() if name.startswith(NAMES)}

    @property
    def teaches(self) -> bool:
        """Whether there is an example of any class, or with any number; a task without one is told the names of its
        classes alone."""
        if self.labels.is_floating_point():
            return len(self) > 0
        return len(self) > self.n_way or bool((self.labels != OUT_OF_SCOPE).any())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        inputs = {name: function(tensor) for name, tensor in self.inputs.items()}
        names = self.names and {name: function(tensor) for name, tensor in self.names.items()}
        return Batch(inputs, function(self.labels), self.n_way, names)


@dataclass(frozen=True)
class Episode:
    """An encoded task: learn from ``support``, answer ``query``.

    Attributes:
        unlabelled: inputs of the domain that is to be answered for, without their classes (all ``OUT_OF_SCOPE``); only
            of training episodes, and only where the learner is to know them.
    """

    spec: EpisodeSpec
    support: Batch
    query: Batch
    unlabelled: Batch | None = None

    def to(self, device: torch.device | str) -> Episode:
        unlabelled = self.unlabelled and self.unlabelled.to(device)
        return replace(self, support=self.support.to(device), query=self.query.to(device), unlabelled=unlabelled)


@dataclass
class MetaGrad:
    """Sums over episodes, so that parts from any number of processes add up to one answer.

    Attributes:
        grads: summed meta-gradient by parameter name.
        loss: summed query loss (mean over the queries of an episode), a 0-d tensor.
        accuracy: summed query accuracy in [0, 1], a 0-d tensor; of a regression, the summed negative mean squared
            error, of which more is better, too.
        episodes: how many episodes the sums cover.
        logits: query logits ``[n, n_way]`` of each episode, detached.
    """

    grads: dict[str, Tensor]
    loss: Tensor
    accuracy: Tensor
    episodes: int
    logits: list[Tensor] = field(default_factory=list)

    def __add__(self, other: MetaGrad) -> MetaGrad:
        if self.grads.keys() != other.grads.keys():
            raise ValueError(
                f"Cannot add meta-gradients of different parameters: "
                f"{sorted(self.grads.keys() ^ other.grads.keys())}. Use one learner for both."
            )
        return MetaGrad(
            {name: grad + other.grads[name] for name, grad in self.grads.items()},
            self.loss + other.loss,
            self.accuracy + other.accuracy,
            self.episodes + other.episodes,
            self.logits + other.logits,
        )


@runtime_checkable
class Learner(Protocol):
    """Two pure functions and a gradient. Nothing here keeps state between calls.

    ``params`` are the meta-parameters; a learner never writes to the tensors it is given.
    """

    @property
    def transductive(self) -> bool:
        """Whether the answer to one query may depend on the other queries beside it."""
        ...

    def init_params(self) -> dict[str, Tensor]:
        """Untrained meta-parameters: fresh, detached copies."""
        ...

    def adapt(self, params: Params, support: Batch) -> State:
        """Learn a task from ``support``. The result carries no autograd graph."""
        ...

    def predict(self, params: Params, state: State, query: Batch) -> Tensor:
        """Logits ``[len(query), n_way]``. Query labels are ignored."""
        ...

    def meta_grad(self, params: Params, episodes: Sequence[Episode]) -> MetaGrad:
        """Summed gradient of the episodes' query loss with respect to ``params``.

        It draws no random numbers, or draws them from a generator seeded by the episode's own address: the sum is then
        the same however the episodes are dealt to processes.
        """
        ...


def check_learner(learner: Any) -> None:
    """Raise ``TypeError`` where ``learner`` is something else, such as the adapter that holds one."""
    if not isinstance(learner, Learner):
        raise TypeError(
            f"learner of type {type(learner).__name__} does not adapt and predict. Give a learner, which of an adapter "
            f"is adapter.learner, with adapter.params."
        )
