"""What the local metrics share: they run without the network and leave no files behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import datasets
import evaluate
import numpy as np


class LocalMetric(evaluate.Metric, ABC):
    """An ``evaluate.Metric`` over integer labels whose value is one number.

    ``evaluate.load`` asks the Hub for a script even for accuracy; a class does not. Predictions are kept in memory
    rather than in arrow files, and no cache folder is made.

    A subclass gives ``key`` (its name in the result), ``description`` and ``score``.
    """

    key: str
    description: str

    def __init__(self, **options: Any) -> None:
        options.setdefault("keep_in_memory", options.get("num_process", 1) == 1)
        super().__init__(**options)

    @staticmethod
    @abstractmethod
    def score(predictions: np.ndarray, references: np.ndarray) -> float:
        """The metric of integer ``predictions [n]`` and ``references [n]``: a pure function, cheap to call."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions and references: integer labels, of one length.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _build_data_dir(self) -> str:
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        return {self.key: self.score(np.asarray(predictions), np.asarray(references))}
