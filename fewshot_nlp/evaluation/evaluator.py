"""Run a learner over a list of episodes, on one process or a share of it on each of several."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from fewshot_nlp.evaluation.metrics import load_metric
from fewshot_nlp.evaluation.results import METRICS_BY_SCORE, EvaluationResult, pooled_metrics
from fewshot_nlp.learners import BaseLearner
from fewshot_nlp.learners.scheduling import ScheduledLearner
from fewshot_nlp.learners.stacking import stacks
from fewshot_nlp.learners.workers import side_by_side, workers_for
from fewshot_nlp.types import Batch, Episode, EpisodeSpec, Learner, Params, check_learner

#: Episodes that may be answered in one stack.
AT_ONCE = 16


def evaluate(
    learner: Learner,
    params: Params,
    specs: Iterable[EpisodeSpec],
    reader: Callable[[EpisodeSpec], Episode],
    *,
    metrics: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> EvaluationResult:
    """Adapt to each episode of ``specs`` and answer its queries.

    Args:
        learner, params: the method and its meta-parameters, on ``device``.
        specs: the episodes, such as ``[sampler[i] for i in range(600)]``, or a sampler that has ``num_episodes``.
        reader: turns a spec into an encoded episode.
        metrics: names of the metrics (see ``fewshot_nlp.evaluation.metrics``) over all queries; accuracy and macro F1
            if not given, and of regressions R².
        device: where the episodes go; by default where ``params`` are.
        progress: show a progress bar.
        shard: ``(rank, world size)``: this call takes episodes ``rank, rank + world size, ...``; ``merge`` puts the
            results of all ranks back together.

    Raises:
        ValueError: no episodes, or an endless sampler of them; an impossible shard, an unknown metric, logits of a
            wrong shape, or an episode without in-scope queries.
        TypeError: something else than a learner.
    """
    check_learner(learner)
    rank, world_size = shard
    if not 0 <= rank < world_size:
        raise ValueError(f"shard={shard} must be (rank, world size) with a rank from 0 to world size - 1.")
    if getattr(specs, "num_episodes", 0) is None:
        raise ValueError(
            "specs is an endless sampler. Evaluate a part of it, such as [sampler[i] for i in range(600)], or set its "
            "num_episodes."
        )
    specs = list(specs)
    if not specs:
        raise ValueError("specs is empty. Evaluate 1 episode or more.")
    if isinstance(metrics, str):
        raise ValueError(f"metrics={metrics!r} must be a list of names: [{metrics!r}].")
    for name in metrics or ():
        load_metric(name)
    if device is None:
        device = next((tensor.device for tensor in params.values()), None)

    if isinstance(learner, BaseLearner):
        learner = learner.fixed(params)
    result = EvaluationResult([], [], [], [], [])
    mine = specs[rank::world_size]
    episodes = (reader(spec) if device is None else reader(spec).to(device) for spec in mine)
    bar = tqdm(mine, desc="evaluate", unit="episode", disable=not progress)
    with closing(_answers(params, learner, episodes)) as answers:
        for spec, (query, logits, adapt_seconds, predict_seconds) in zip(bar, answers, strict=True):
            result.adapt_seconds += adapt_seconds
            result.predict_seconds += predict_seconds
            result.record(spec, query, logits)
    result.metrics = pooled_metrics(result, METRICS_BY_SCORE[result.score] if metrics is None else metrics)
    return result


#: Queries, their logits, and the seconds of adaptation and of answering.
Answer = tuple[Batch, Tensor, float, float]


def _answers(params: Params, learner: Learner, episodes: Iterator[Episode]) -> Generator[Answer, None, None]:
    """What becomes of each episode: together with its neighbours in one stack, or side by side with others."""
    workers, work = _workers(learner), partial(_answer, params)
    stacked = learner if isinstance(learner, ScheduledLearner) and learner.stackable and learner.fast_body else None
    count = AT_ONCE if stacked else 8 * len(workers) if len(workers) > 1 else 1
    while part := list(islice(episodes, count)):
        if stacked:
            for group in stacks(stacked, part, stacked.answers_at_once(part)):
                yield from _of_stack(params, stacked, group) if len(group) > 1 else [work(learner, group[0])]
            continue
        start, ahead = _now(part[0]), 0.0
        if isinstance(learner, BaseLearner) and len(workers) > 1:
            learner.read_ahead(part)
            ahead = (_now(part[0]) - start) / len(part)
        for query, logits, adapt_seconds, predict_seconds in side_by_side(work, workers, part):
            # What is read of the lower layers is of examples and queries alike.
            yield query, logits, adapt_seconds + ahead / 2, predict_seconds + ahead / 2


def _of_stack(params: Params, learner: ScheduledLearner, episodes: Sequence[Episode]) -> Iterator[Answer]:
    start, share = _now(episodes[0]), 1 / len(episodes)
    answers = learner.adapt_stack(params, episodes)
    adapted = _now(episodes[0])
    logits = answers()
    predicted = _now(episodes[0])
    for episode, own in zip(episodes, logits, strict=True):
        yield episode.query, own, share * (adapted - start), share * (predicted - adapted)


def _workers(learner: Learner) -> list[Learner]:
    """The learner, and its twins where episodes go side by side."""
    if not isinstance(learner, BaseLearner):
        return [learner]
    return [learner, *(learner.twin() for _ in range(workers_for(learner) - 1))]


def _answer(params: Params, learner: Learner, episode: Episode) -> Answer:
    start = _now(episode)
    state = learner.adapt(params, episode.support)
    adapted = _now(episode)
    with torch.no_grad():
        logits = learner.predict(params, state, episode.query)
    return episode.query, logits, adapted - start, _now(episode) - adapted


def _now(episode: Episode) -> float:
    """Seconds on the wall clock, once an accelerator has done what it was asked."""
    if episode.query.labels.is_cuda:
        torch.cuda.synchronize(episode.query.labels.device)
    return time.perf_counter()
