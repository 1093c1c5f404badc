"""Macro F1 (van Rijsbergen, 1979): the mean over classes of the harmonic mean of precision and recall."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import f1_score

from fewshot_nlp.evaluation.metrics.base import LocalMetric
from fewshot_nlp.types import OUT_OF_SCOPE


class MacroF1(LocalMetric):
    """Macro F1 in [0, 1] over the classes of the references; out-of-scope references are left out.

    A class that is only ever predicted lowers the precision of no class but its own, and counts for nothing:
    its recall is undefined.
    """

    key = "macro_f1"
    description = "Unweighted mean of the F1 of each class among the references; out-of-scope references are left out."

    @staticmethod
    def score(predictions: np.ndarray, references: np.ndarray) -> float:
        asked = references != OUT_OF_SCOPE
        predictions, references = predictions[asked], references[asked]
        if not references.size:
            return float("nan")
        classes = np.unique(references)
        return float(f1_score(references, predictions, labels=classes, average="macro", zero_division=0))
