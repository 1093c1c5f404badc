"""Validation metrics: their names, their means, and which of two is better."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fewshot_nlp.evaluation import EvaluationResult
from fewshot_nlp.training.arguments import FewShotTrainingArguments
from fewshot_nlp.types import EpisodeSpec


def metric_key(metric: str) -> str:
    """``accuracy`` or ``eval_accuracy`` to ``eval_accuracy``, as transformers does."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def validation_metrics(results: Mapping[str, EvaluationResult]) -> dict[str, float]:
    """``eval_<name>_accuracy`` and ``eval_<name>_loss`` by result; their means ``eval_accuracy``, ``eval_loss``. Of
    regressions it is ``negative_mse`` in place of ``accuracy``."""
    score = next(iter(results.values())).score
    metrics = {
        f"eval_{score}": sum(result.accuracy for result in results.values()) / len(results),
        "eval_loss": sum(result.loss for result in results.values()) / len(results),
    }
    for name, result in results.items():
        metrics |= {f"eval_{name}_{score}": result.accuracy, f"eval_{name}_loss": result.loss}
    return metrics


def check_label_names(learner: Any, reader: Any) -> None:
    """Raise ``ValueError`` where a learner is to be given the names of classes and its reader leaves them out."""
    for name, default in (("use_label_names", False), ("names_in_training_alone", False), ("label_texts", "name")):
        told = getattr(getattr(learner, "config", None), name, default)
        given = getattr(reader, name, told)
        if told != given:
            raise ValueError(
                f"The learner has {name}={told!r}, and the reader {given!r}: what is saved would be used in another "
                f"way than it was trained. Pass {name}={told!r} to EpisodeReader, too."
            )


def check_unlabelled(learner: Any, reader: Any) -> None:
    """Raise ``ValueError`` where a learner reads unlabelled inputs and its reader gives none, or the reverse."""
    reads = getattr(learner, "reads_unlabelled", False)
    given = getattr(reader, "n_unlabelled", None)
    if given is not None and reads != (given > 0):
        remedy = "Leave it out, or use learner='domain_adversarial'" if given else "Set it, to 25 for example"
        raise ValueError(
            f"n_unlabelled={given}, and the learner {'reads' if reads else 'does not read'} texts without labels. "
            f"{remedy}."
        )


def check_target(learner: Any, samplers: Iterable[Any]) -> None:
    """Raise ``ValueError`` where a learner weighs tasks of a target of which ``samplers``, whose pools are known, draw
    none."""
    target = getattr(getattr(learner, "options", None), "target", None)
    known = [name for sampler in samplers for name in getattr(sampler, "pools", ())]
    if target is not None and known and target not in known:
        raise ValueError(
            f"learner_kwargs: target={target!r} is none of the data sets that training tasks are of, so that it would "
            f"weigh nothing. Use one of: {', '.join(known)}."
        )


def score_of(learner: Any) -> str:
    """The name of what ``MetaGrad.accuracy`` holds; the accuracy where a learner does not say."""
    return getattr(getattr(learner, "config", None), "score", "accuracy")


def check_samplers(train_sampler: Any, eval_samplers: Any, args: FewShotTrainingArguments) -> None:
    """Raise ``ValueError`` where eval samplers have no names, or a sampler ends before the run does."""
    if not isinstance(eval_samplers, Mapping):
        raise ValueError(
            f"eval_samplers of type {type(eval_samplers).__name__} must be samplers by name, such as "
            f"{{'1-shot': sampler}}."
        )
    asked = {"train_sampler": (train_sampler, args.max_steps * args.episodes_per_step, "max_steps")}
    for name, sampler in eval_samplers.items():
        asked[f"eval_samplers[{name!r}]"] = sampler, args.eval_episodes, "eval_episodes"
    for place, (sampler, count, setting) in asked.items():
        length = len(sampler) if isinstance(sampler, Sequence) else getattr(sampler, "num_episodes", None)
        if length is not None and length < count:
            raise ValueError(
                f"{place} has {length} episodes, and {setting}={getattr(args, setting)} asks for {count}. Lower "
                f"{setting}, or give a sampler without num_episodes, which is endless."
            )


def check_validation(args: FewShotTrainingArguments, names: Iterable[str], score: str = "accuracy") -> None:
    """Raise ``ValueError`` where ``args`` asks for a validation, or a metric, that the eval samplers do not give."""
    names = list(names)
    if args.eval_strategy == "no":
        return
    if not names:
        raise ValueError("eval_strategy='steps' needs eval_samplers, and there are none. Set eval_strategy: no.")
    known = [f"{prefix}{metric}" for prefix in ["", *(f"{n}_" for n in names)] for metric in (score, "loss")]
    if metric_key(args.metric_for_best_model) not in map(metric_key, known):
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not measured. Use one of: {', '.join(known)}."
        )


def kind_of_validation(
    args: FewShotTrainingArguments, specs: Mapping[str, Sequence[EpisodeSpec]], samplers: Iterable[Any]
) -> dict[str, Any]:
    """What two validations have in common of which one can be called better."""
    pools = [[pool.fingerprint for pool in getattr(sampler, "pools", {}).values()] for sampler in samplers]
    return {
        "metric_for_best_model": metric_key(args.metric_for_best_model),
        "greater_is_better": args.greater_is_better,
        "validation episodes": digest((specs, pools)),
    }


def digest(value: Any) -> str:
    """A hash of what ``value`` shows."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def is_better(args: FewShotTrainingArguments, value: float, best: float | None) -> bool:
    """Whether ``value`` beats ``best``; a NaN beats nothing."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value > best if args.greater_is_better else value < best
