"""R², the coefficient of determination: the share of the targets' variance that the answers explain."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import r2_score

from fewshot_nlp.evaluation.metrics.base import LocalMetric


class R2(LocalMetric):
    """R² of all answers together, at most 1; 0 is what always answering the mean target gets.

    NaN for fewer than two answers, and where one is not finite.
    """

    key = "r2"
    description = "Coefficient of determination of real-valued predictions."
    dtype = "float64"

    @staticmethod
    def score(predictions: np.ndarray, references: np.ndarray) -> float:
        if references.size < 2 or not np.isfinite(predictions).all():
            return float("nan")
        return float(r2_score(references, predictions))
