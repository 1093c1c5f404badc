"""Metrics as local ``evaluate.Metric`` classes, by name, with no Hub."""

from __future__ import annotations

from fewshot_nlp.evaluation.metrics.accuracy import Accuracy, AccuracyWithOutOfScope
from fewshot_nlp.evaluation.metrics.base import LocalMetric
from fewshot_nlp.evaluation.metrics.f1 import MacroF1
from fewshot_nlp.evaluation.metrics.r2 import R2

METRICS: dict[str, type[LocalMetric]] = {
    metric.key: metric for metric in (Accuracy, AccuracyWithOutOfScope, MacroF1, R2)
}


def load_metric(name: str) -> LocalMetric:
    """The metric called ``name``, fresh, with ``evaluate``'s ``add_batch`` and ``compute``.

    Raises:
        ValueError: no metric has this name.
    """
    if name not in METRICS:
        raise ValueError(f"metric={name!r} is not known. Use one of: {', '.join(METRICS)}.")
    return METRICS[name]()


__all__ = ["METRICS", "R2", "Accuracy", "AccuracyWithOutOfScope", "LocalMetric", "MacroF1", "load_metric"]
