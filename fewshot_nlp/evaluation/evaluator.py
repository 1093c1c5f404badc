"""Run a learner over a list of episodes, on one process or a share of it on each of several, and compare learners."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from fewshot_nlp.config import TASKS
from fewshot_nlp.evaluation.intervals import Interval, mean_interval, paired_interval
from fewshot_nlp.evaluation.metrics import Accuracy, load_metric
from fewshot_nlp.learners import BaseLearner
from fewshot_nlp.learners.base import episode_loss
from fewshot_nlp.learners.scheduling import ScheduledLearner
from fewshot_nlp.learners.stacking import stacks
from fewshot_nlp.learners.workers import side_by_side, workers_for
from fewshot_nlp.types import OUT_OF_SCOPE, Batch, Episode, EpisodeSpec, Learner, Params

#: Episodes that may be answered in one stack.
AT_ONCE = 16
#: Answer to a query whose logits hold a NaN: right for no reference.
NO_ANSWER = -2
METRICS_BY_SCORE = {"accuracy": ("accuracy", "macro_f1"), "negative_mse": ("r2",)}


@dataclass
class EvaluationResult:
    """What a learner answered, episode by episode, in the order of ``specs``. All lists have one entry an episode.

    Attributes:
        specs: the episodes.
        predictions: answered episode labels, one a query; ``NO_ANSWER`` where the logits held a NaN. Of regressions,
            the answered numbers.
        references: true episode labels, one a query; ``OUT_OF_SCOPE`` for classes outside the episode. Of regressions,
            the targets.
        accuracies: accuracy in [0, 1] over the in-scope queries; of regressions, the negative mean squared error.
        losses: mean cross-entropy of the in-scope queries, in nats; of regressions, the mean squared error.
        adapt_seconds: wall-clock seconds of ``learner.adapt`` in all, of episodes side by side added up.
        predict_seconds: the same of ``learner.predict``.
        metrics: each metric by name, over all queries of all episodes, with class names (not episode labels) as labels.
        score: what ``accuracies`` holds: ``"accuracy"``, or of regressions ``"negative_mse"``.
    """

    specs: list[EpisodeSpec]
    predictions: list[list[Any]]
    references: list[list[Any]]
    accuracies: list[float]
    losses: list[float]
    adapt_seconds: float = 0.0
    predict_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    score: str = TASKS["classification"]

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def interval(self) -> Interval:
        """Mean of ``accuracies`` over episodes with its 95 % interval."""
        return mean_interval(self.accuracies)

    @property
    def accuracy(self) -> float:
        """Mean of ``accuracies`` over episodes; of a regression it is not finite where an answer is not."""
        return float(np.mean(self.accuracies))

    @property
    def loss(self) -> float:
        """Mean loss over episodes; NaN or infinite if that of any episode is."""
        return float(np.mean(self.losses))


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
    """
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
            _record(result, spec, query, logits)
    result.metrics = _pooled_metrics(result, METRICS_BY_SCORE[result.score] if metrics is None else metrics)
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


def merge(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    """The result of one process, from ``parts[r]`` evaluated with ``shard=(r, len(parts))``.

    Seconds add up: they are the time of one process doing all the work.

    Raises:
        ValueError: the parts cannot be the shards of one list of episodes.
    """
    sizes = [len(part) for part in parts]
    total, world_size = sum(sizes), len(parts)
    if not parts or sizes != [len(range(rank, total, world_size)) for rank in range(world_size)]:
        raise ValueError(f"Parts of {sizes} episodes are not the shards of one list. Give every rank's, in rank order.")

    def interleave(name: str) -> list:
        columns = [getattr(part, name) for part in parts]
        return [columns[i % world_size][i // world_size] for i in range(total)]

    result = EvaluationResult(
        specs=interleave("specs"),
        predictions=interleave("predictions"),
        references=interleave("references"),
        accuracies=interleave("accuracies"),
        losses=interleave("losses"),
        adapt_seconds=sum(part.adapt_seconds for part in parts),
        predict_seconds=sum(part.predict_seconds for part in parts),
        score=parts[0].score,
    )
    result.metrics = _pooled_metrics(result, list(parts[0].metrics))
    return result


def compare(
    result: EvaluationResult, baselines: Mapping[str, EvaluationResult], *, reference: str = "prototypes"
) -> dict[str, Any]:
    """``result`` beside ``baselines`` on the same episodes: one entry of ``results.json``'s ``"test"``.

    A slow baseline may have answered only the first m episodes; its paired gain is then over those m.

    Returns:
        ``{"accuracy", "ci95", "episodes", "loss", "metrics", "adapt_seconds", "predict_seconds",
        "baselines": {name: the same}, "paired_gain": {"mean", "ci95", "episodes"},
        "paired_gains": {name: the same}}``: accuracies as fractions, ``ci95`` the half-width of a 95 % interval
        (``None`` for one episode), gains as result minus baseline, ``paired_gain`` over
        ``reference``, seconds an episode. Of regressions, ``"negative_mse"`` stands in place of ``"accuracy"``.

    Raises:
        ValueError: no result, no baseline called ``reference``, or a baseline that answered other episodes.
    """
    if reference not in baselines:
        raise ValueError(f"reference={reference!r} is not among the baselines {list(baselines)}. Evaluate it too.")
    gains = {}
    for name, baseline in baselines.items():
        shared = min(len(result), len(baseline))
        for ours, theirs in zip(result.specs, baseline.specs, strict=False):
            if ours != theirs:
                raise ValueError(
                    f"Baseline {name!r} answered {theirs.address} where the learner answered {ours.address}, or "
                    f"other rows of it. Evaluate both on one list of episodes."
                )
        gain = paired_interval(result.accuracies[:shared], baseline.accuracies[:shared])
        gains[name] = {"mean": gain.mean, "ci95": gain.ci95, "episodes": gain.n}
    return {
        **_summary(result),
        "baselines": {name: _summary(baseline) for name, baseline in baselines.items()},
        "paired_gain": gains[reference],
        "paired_gains": gains,
    }


def _summary(result: EvaluationResult) -> dict[str, Any]:
    interval = result.interval
    return {
        result.score: interval.mean,
        "ci95": interval.ci95,
        "episodes": interval.n,
        # JSON has no NaN or infinity.
        "loss": result.loss if math.isfinite(result.loss) else None,
        "metrics": {name: value if math.isfinite(value) else None for name, value in result.metrics.items()},
        "adapt_seconds": result.adapt_seconds / interval.n,
        "predict_seconds": result.predict_seconds / interval.n,
    }


def _record(result: EvaluationResult, spec: EpisodeSpec, query: Batch, logits: Tensor) -> None:
    """Append one episode's answers to ``result``."""
    if logits.shape != (len(query), query.n_way):
        raise ValueError(
            f"Episode {spec.address}: predict gave logits of shape {tuple(logits.shape)}, not "
            f"{(len(query), query.n_way)}. Return one row a query and one column a class."
        )
    labels, logits = query.labels, logits.float()
    if labels.is_floating_point():
        result.score = TASKS["regression"]
        result.specs.append(spec)
        result.predictions.append(logits[:, 0].tolist())
        result.references.append(labels.tolist())
        result.losses.append(float(episode_loss(logits, labels)))
        result.accuracies.append(-result.losses[-1])
        return
    if not (labels != OUT_OF_SCOPE).any():
        raise ValueError(f"Episode {spec.address} has no query of its own classes. Use n_query of at least 1.")
    # argmax takes a NaN for the largest: a learner that diverged must not be credited with a guess.
    answers = logits.argmax(-1).masked_fill(logits.isnan().any(-1), NO_ANSWER).cpu()
    result.specs.append(spec)
    result.predictions.append(answers.tolist())
    result.references.append(labels.tolist())
    result.accuracies.append(Accuracy.score(answers.numpy(), labels.cpu().numpy()))
    result.losses.append(float(episode_loss(logits, labels)))


def _pooled_metrics(result: EvaluationResult, names: Sequence[str]) -> dict[str, float]:
    """Metrics over all queries."""
    if not result.specs or not names:
        return dict.fromkeys(names, float("nan"))
    if result.score == TASKS["regression"]:
        predictions, references = (list(chain.from_iterable(each)) for each in (result.predictions, result.references))
    else:
        predictions, references = _class_numbers(result)
    scores: dict[str, float] = {}
    for name in names:
        scores |= load_metric(name).compute(predictions=predictions, references=references)
    return scores


def _class_numbers(result: EvaluationResult) -> tuple[list[int], list[int]]:
    """Predictions and references of all queries. Episode label 0 is another class in each episode, so labels become
    class numbers."""
    classes = sorted({(spec.pool, name) for spec in result.specs for name in spec.classes})
    number = {key: i for i, key in enumerate(classes)}

    def pooled(labels_by_episode: list[list[int]]) -> list[int]:
        numbers = []
        for spec, labels in zip(result.specs, labels_by_episode, strict=True):
            own = [number[spec.pool, name] for name in spec.classes]
            numbers += [own[label] if label >= 0 else label for label in labels]
        return numbers

    return pooled(result.predictions), pooled(result.references)


def _now(episode: Episode) -> float:
    """Seconds on the wall clock, once an accelerator has done what it was asked."""
    if episode.query.labels.is_cuda:
        torch.cuda.synchronize(episode.query.labels.device)
    return time.perf_counter()
