"""What the local metrics share: they run without the network and leave no files behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import datasets
import evaluate
import numpy as np


class LocalMetric(evaluate.Metric, ABC):
    """An ``evaluate.Metric`` over integer labels, or real-valued targets, whose value is one number.

    ``evaluate.load`` asks the Hub for a script even for accuracy; a class does not. Predictions are kept in memory
    rather than in arrow files, and no cache folder is made.

    A subclass gives ``key`` (its name in the result), ``description``, ``score`` and, for real values, ``dtype``.
    """

    key: str
    description: str
    dtype: str = "int64"

    def __init__(self, **options: Any) -> None:
        options.setdefault("keep_in_memory", options.get("num_process", 1) == 1)
        super().__init__(**options)

    @staticmethod
    @abstractmethod
    def score(predictions: np.ndarray, references: np.ndarray) -> float:
        """The metric of ``predictions [n]`` and ``references [n]``: a pure function, cheap to call."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=f"predictions and references: {self.dtype} values, of one length.",
            features=datasets.Features({n: datasets.Value(self.dtype) for n in ("predictions", "references")}),
        )

    def _build_data_dir(self) -> str:
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        return {self.key: self.score(np.asarray(predictions), np.asarray(references))}
