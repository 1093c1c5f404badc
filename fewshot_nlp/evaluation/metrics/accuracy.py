"""Accuracy, with and without the queries that belong to no class of the episode."""

from __future__ import annotations

import numpy as np

from fewshot_nlp.evaluation.metrics.base import LocalMetric
from fewshot_nlp.types import OUT_OF_SCOPE


class Accuracy(LocalMetric):
    """Share of right answers in [0, 1]; out-of-scope references are left out."""

    key = "accuracy"
    description = "Share of predictions that equal their reference; out-of-scope references (-1) are left out."

    @staticmethod
    def score(predictions: np.ndarray, references: np.ndarray) -> float:
        asked = references != OUT_OF_SCOPE
        return float((predictions == references)[asked].mean()) if asked.any() else float("nan")


class AccuracyWithOutOfScope(LocalMetric):
    """Share of right answers in [0, 1], where the only right answer to an out-of-scope query is ``OUT_OF_SCOPE``."""

    key = "accuracy_with_out_of_scope"
    description = "Share of predictions that equal their reference; an out-of-scope reference asks for the answer -1."

    @staticmethod
    def score(predictions: np.ndarray, references: np.ndarray) -> float:
        return float((predictions == references).mean()) if references.size else float("nan")
