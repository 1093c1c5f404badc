"""Which tasks, and which inner steps of a task, are computed together: as many as memory holds the graphs of.

All ways give the same gradient. Each follows from a stated rule and never from a timing, so that a resumed run goes the
way that the interrupted one went, to the last bit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.call import check_names
from fewshot_nlp.functional.memory import graph_bytes
from fewshot_nlp.functional.outer import Link, adapt, leaf, leaves
from fewshot_nlp.learners.base import BaseLearner
from fewshot_nlp.learners.stacking import extent, is_stack, pays, refusal, stacked, stacks, trial
from fewshot_nlp.learners.workers import side_by_side, workers_for
from fewshot_nlp.models.model import NAME_TOKENS, FewShotModel
from fewshot_nlp.types import Batch, Episode, MetaGrad, Params, State

#: Size of the batches on which the memory of a step is counted: short texts, and tokens of short and of long ones.
_ROWS, _TOKENS, _LONG = 8, 16, 128


class ScheduledLearner(BaseLearner):
    """A learner whose gradients are of inner loops."""

    #: How the meta-gradient is estimated, unless ``config.estimator`` says otherwise.
    estimator: ClassVar[str] = "exact"
    #: Inner steps whose graphs are in memory together; if not set, as many as ``config.graph_memory_gb`` holds.
    chunk: int | None = None
    #: Whether tasks go in one stack; if not set, where ``stacking.pays``.
    stacking: bool | None = None
    _bytes_by_length: dict[int, float]
    _trials: dict[str, str | None]

    def __init__(self, config: FewShotConfig, model: FewShotModel) -> None:
        super().__init__(config, model)
        self._trials, self._bytes_by_length = {}, {}

    @property
    def own_gradient(self) -> bool:
        """Whether the method's gradient is more than its estimator's."""
        return False

    @abstractmethod
    def links(self, support: Batch, exact_steps: int | None = None, apart: bool = False) -> list[Link]:
        """A task's adaptation, one link after another."""

    @property
    def estimator_name(self) -> str:
        """How the meta-gradient is estimated."""
        return self.config.estimator or self.estimator

    def steps_in_memory(self, support: Batch, query: Batch | None = None) -> int:
        """How many inner steps' graphs ``config.graph_memory_gb`` holds, one at least.

        With a multi-step loss each step has a graph of the ``query`` set, too, which is smaller by the text.

        The memory of a step is counted once, on batches of our own, and taken to grow with the number of texts, tokens
        and pairs of tokens, or images. It must not follow from the first episode at hand: the chunk decides the order
        of sums, and with it the last bit of a resumed run.
        """
        needed = self._graph_bytes(support)
        if query and self.config.step_loss_weights:
            needed += self._graph_bytes(query)
        return max(1, int(self._graph_memory / needed))

    def _graph_bytes(self, batch: Batch, rows: int | None = None, length: int | None = None) -> float:
        """What a step's graph of a batch takes; of one with other numbers of ``rows`` and tokens, where they are given.

        The scores of attention grow with the square of the length, all else with the length.
        """
        own_rows, own_length = extent(batch)
        rows, length = rows or own_rows, length or own_length
        if "attention_mask" not in batch.inputs:
            return rows * self._count(batch, 1)
        short, long = min(_TOKENS, self.config.max_length), self.model.longest or _LONG
        each = self._count(batch, short) / short
        long = min(long, self.config.max_length, _LONG)
        # What short texts take is not worth a count of long ones.
        if length <= 2 * _TOKENS or long <= 2 * _TOKENS:
            return rows * length * each
        by_square = max(self._count(batch, long) / long - each, 0.0) / (long - _TOKENS)
        return rows * length * (each + by_square * (length - _TOKENS))

    @torch.inference_mode(False)
    def _count(self, like: Batch, length: int) -> float:
        """Bytes that a step's graph takes for each text of so many tokens, or each image."""
        if length not in self._bytes_by_length:
            theta = leaves(self.init_params())
            # Of long texts fewer, so that the count takes no more memory than training may.
            count = max(2, _ROWS * _TOKENS // max(length, _TOKENS))
            if "attention_mask" in like.inputs:
                rows = self.model.any_texts(count, length)
            else:
                some = {name: t[0] if is_stack(like) else t for name, t in like.inputs.items()}
                rows = {name: t[:1].expand(count, *t.shape[1:]).clone() for name, t in some.items()}
            labels = torch.arange(count, device=like.labels.device, dtype=like.labels.dtype) % 2
            batch = Batch(rows, labels, 2)
            if self.asks:
                batch = batch.asked(self.model.any_texts(2, NAME_TOKENS))
            # The second step, where there is one: from a blind head, the first one keeps less.
            *before, link = self.links(batch)[:2]
            with self.model.frozen_in(self.config.frozen_dtype):
                carry = adapt(before, theta).map(leaf) if before else None
                counted = graph_bytes(lambda: link(theta, carry, True), self.model.module.parameters())
            self._bytes_by_length[length] = counted / count
        return self._bytes_by_length[length]

    @property
    def _graph_memory(self) -> float:
        """Bytes for the graphs of inner steps."""
        given, device = self.config.graph_memory_gb, self.model.device
        if given is None and device.type == "cuda":
            parts = [*self.model.module.parameters(), *self.model.module.buffers()]
            total = torch.cuda.get_device_properties(device).total_memory
            return max(total - sum(part.nbytes for part in parts), 0) / 2
        return (2.0 if given is None else given) * 2**30

    def meta_grad(self, params: Params, episodes: Sequence[Episode]) -> MetaGrad:
        """Sum of the episodes' gradients, as many together as ``tasks_at_once`` says."""
        if len(episodes) < 2:
            return super().meta_grad(params, episodes)
        check_names(params, self.names)
        with self.model.frozen_in(self.config.frozen_dtype):
            count = self.tasks_at_once(episodes)
            if self.stackable:
                groups = stacks(self, episodes, count)
                parts = [self._stack_grad(params, g) if len(g) > 1 else self._told_grad(params, g[0]) for g in groups]
                return sum(parts[1:], parts[0])
            if count > 1:
                self.read_ahead(episodes)
        workers = [self, *(self.twin() for _ in range(count - 1))]
        # Each task puts torch's generator back to where it was, which beside others is where these have it.
        with torch.random.fork_rng(devices=[], enabled=count > 1):
            parts = list(side_by_side(partial(_gradient, params), workers, episodes))
        return sum(parts[1:], parts[0])

    def _stack_grad(self, params: Params, episodes: Sequence[Episode]) -> MetaGrad:
        """Sum of the gradients of tasks that are alike, all at once."""
        whole = self._stack(episodes)
        whole = replace(whole, support=self._ready(whole.support), query=self._ready(whole.query))
        with self.model.of_tasks():
            part = self._episode_grad(params, whole)
        return replace(part, logits=_own(part.logits, episodes))

    def _stack(self, episodes: Sequence[Episode]) -> Episode:
        return stacked([replace(episode, support=self._known(episode.support)) for episode in episodes])

    @torch.inference_mode(False)
    def _ready(self, batch: Batch) -> Batch:
        return replace(batch, inputs=self.model.ready(batch.inputs)) if self.keeps_trunk else batch

    def adapt_stack(self, params: Params, episodes: Sequence[Episode]) -> Callable[[], list[Tensor]]:
        """Adapt to tasks that are alike, all at once; what then gives the logits of their queries, ``[n, n_way]``
        each."""
        check_names(params, self.names)
        whole = self._stack(episodes)
        with self.model.of_tasks():
            state = self._adapted(params, self._ready(whole.support))

        def answers() -> list[Tensor]:
            query = self._ready(whole.query)
            with self.model.of_tasks(), torch.no_grad():
                return _own(self._answered(params, state, query)[1], episodes)

        return answers

    @abstractmethod
    def _answered(self, params: Params, state: State, query: Batch) -> tuple[Tensor, Tensor]:
        """Loss and logits of the queries; of a stack, the sum of the tasks' losses."""

    @property
    def stackable(self) -> bool:
        """Whether stacks are to be tried."""
        return pays(self.model) if self.stacking is None else self.stacking

    def _refusal(self, like: Batch) -> str | None:
        """Why tasks cannot be in one stack; ``None`` where they can."""
        if (reason := refusal(self)) is not None:
            return reason
        with self.model.frozen_in(self.config.frozen_dtype):
            key = f"{self.model.device} {self.model.precision}"
            if key not in self._trials:
                self._trials[key] = trial(self, like)
        return self._trials[key]

    def _stack_size(self, supports: Sequence[Batch], queries: Sequence[Batch], tasks: int, steps: int) -> int:
        """How many of so many tasks are in a stack, where the graphs of so many steps of each are held, and that of its
        queries; no more stacks than need be, and of one size."""
        if tasks < 2 or self._refusal(supports[0]) is not None:
            return 1
        # All are filled up to the largest.
        support, query = (
            self._graph_bytes(batches[0], *map(max, zip(*map(extent, batches), strict=True)))
            for batches in (supports, queries)
        )
        apart = self.config.step_loss_weights is None
        most = max(1, int(self._graph_memory / (steps * support + (1 if apart else steps) * query)))
        return math.ceil(tasks / math.ceil(tasks / most))

    def _stack_for(self, episodes: Sequence[Episode], steps: int) -> int:
        known, queries = [self._known(each.support) for each in episodes], [each.query for each in episodes]
        return self._stack_size(known, queries, len(episodes), steps)

    def tasks_at_once(self, episodes: Sequence[Episode]) -> int:
        """How many of the episodes' gradients are computed together."""
        if self.stackable:
            return self._stack_for(episodes, self._steps_needed)
        count = self._most_at_once(len(episodes))
        if count == 1:
            return 1
        held = min(self.steps_in_memory(self._known(each.support), each.query) for each in episodes)
        return count if self._holds(count, held) else 1

    def answers_at_once(self, episodes: Sequence[Episode]) -> int:
        """How many of the episodes are adapted to and answered together."""
        return self._stack_for(episodes, 1) if self.stackable and self.fast_body else 1

    def _most_at_once(self, tasks: int) -> int:
        return workers_for(self, tasks) if self.model.voice is None else 1

    def _holds(self, tasks: int, steps: int) -> bool:
        """Whether memory for the graphs of so many ``steps`` is enough for so many ``tasks`` side by side. Where steps
        would have to be run again for it, they take longer than all cores on one task."""
        return steps >= tasks * self._steps_needed

    @property
    def _steps_needed(self) -> int:
        """How many inner steps' graphs are needed together where none is to run again."""
        steps = self.config.inner_steps
        keeps = self.estimator_name in ("exact", "truncated") or self.config.step_loss_weights is not None
        return max(min(steps, self.chunk or steps), 1) if keeps else 1

    def describe(self, support: Batch, tasks: int = 1) -> str:
        """How the meta-gradient of so many tasks with such a support set is computed, in words."""
        estimator, steps = self.estimator_name, self.config.inner_steps
        words = estimator.replace("_", " ")
        if estimator in ("exact", "truncated") and steps > 1:
            chunk = self.chunk or self.steps_in_memory(support)
            words += (
                f", all {steps} inner steps in one graph"
                if chunk >= len(self.links(support))
                else f", graphs of {chunk} of {steps} inner steps in memory at a time, the others run again"
            )
        count, trunk = self._most_at_once(tasks), self.model.trunk
        if self.stackable:
            # Of queries nothing is known; there are as many as examples.
            if (size := self._stack_size([support], [support], tasks, self._steps_needed)) > 1:
                words += f"; {size} tasks in one stack"
            elif tasks > 1 and (reason := self._refusal(support)) is not None:
                words += f"; one task at a time, as {reason}"
        elif count > 1 and self._holds(count, self.steps_in_memory(support)):
            words += f"; {count} tasks side by side"
        if trunk is not None and self.keeps_trunk:
            # Whether what they hand on can be kept shows when they have run.
            self.model.read_ahead(support.inputs)
            words += f"; the lowest {trunk.depth} layers run once a text" if trunk.works else ""
        if self.model.sees_padding:
            words += "; texts of one length together, as the backbone sees padding"
        return words

    def _part(self, grads: dict[str, Tensor], logits: Tensor, labels: Tensor) -> MetaGrad:
        if labels.dim() == 1:
            return super()._part(grads, logits, labels)
        own = [super(ScheduledLearner, self)._part({}, *answers) for answers in zip(logits, labels, strict=True)]
        return replace(sum(own[1:], own[0]), grads=grads)


def _own(logits: Iterable[Tensor], episodes: Sequence[Episode]) -> list[Tensor]:
    """Of each task, those of its own queries: what a stack has beside them is in front."""
    return [part[len(part) - len(episode.query) :] for part, episode in zip(logits, episodes, strict=True)]


def _gradient(params: Params, learner: ScheduledLearner, episode: Episode) -> MetaGrad:
    with learner.model.frozen_in(learner.config.frozen_dtype):
        return learner._told_grad(params, episode)
