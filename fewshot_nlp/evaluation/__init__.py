"""Results that can be trusted: per-episode accuracies, intervals, and paired differences from baselines."""

from __future__ import annotations

from fewshot_nlp.evaluation.evaluator import evaluate
from fewshot_nlp.evaluation.intervals import Interval, mean_interval, paired_interval
from fewshot_nlp.evaluation.protocol import build_protocol, split_hash
from fewshot_nlp.evaluation.results import EvaluationResult, compare, merge
from fewshot_nlp.evaluation.tables import results_table

__all__ = [
    "EvaluationResult",
    "Interval",
    "build_protocol",
    "compare",
    "evaluate",
    "mean_interval",
    "merge",
    "paired_interval",
    "results_table",
    "split_hash",
]
