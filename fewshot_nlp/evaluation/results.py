"""What a learner answered: kept episode by episode, put together from several processes, and compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

from fewshot_nlp.config import TASKS
from fewshot_nlp.evaluation.intervals import Interval, mean_interval, paired_interval
from fewshot_nlp.evaluation.metrics import Accuracy, load_metric
from fewshot_nlp.learners.base import episode_loss
from fewshot_nlp.types import OUT_OF_SCOPE, Batch, EpisodeSpec

#: Answer to a query whose largest logit is NaN or infinite: right for no reference.
NO_ANSWER = -2
METRICS_BY_SCORE = {"accuracy": ("accuracy", "macro_f1"), "negative_mse": ("r2",)}


@dataclass
class EvaluationResult:
    """What a learner answered, episode by episode, in the order of ``specs``. All lists have one entry an episode.

    Attributes:
        specs: the episodes.
        predictions: answered episode labels, one a query; ``NO_ANSWER`` where the largest logit was NaN or infinite.
            Of regressions, the answered numbers.
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

    def record(self, spec: EpisodeSpec, query: Batch, logits: Tensor) -> None:
        """Append one episode's answers."""
        if logits.shape != (len(query), query.n_way):
            raise ValueError(
                f"Episode {spec.address}: predict gave logits of shape {tuple(logits.shape)}, not "
                f"{(len(query), query.n_way)}. Return one row a query and one column a class."
            )
        labels, logits = query.labels, logits.float()
        loss = float(episode_loss(logits, labels))
        if labels.is_floating_point():
            self.score = TASKS["regression"]
            answers, score = logits[:, 0], -loss
        elif (labels != OUT_OF_SCOPE).any():
            # argmax takes a NaN for the largest, and of equal infinities the first: a learner that diverged must not be
            # credited with a guess.
            answers = logits.argmax(-1).masked_fill(~logits.amax(-1).isfinite(), NO_ANSWER)
            score = Accuracy.score(answers.cpu().numpy(), labels.cpu().numpy())
        else:
            raise ValueError(f"Episode {spec.address} has no query of its own classes. Use n_query of at least 1.")
        self.specs.append(spec)
        self.predictions.append(answers.tolist())
        self.references.append(labels.tolist())
        self.accuracies.append(score)
        self.losses.append(loss)


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
    result.metrics = pooled_metrics(result, list(parts[0].metrics))
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


def pooled_metrics(result: EvaluationResult, names: Sequence[str]) -> dict[str, float]:
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
