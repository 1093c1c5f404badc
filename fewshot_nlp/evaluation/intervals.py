"""95 % intervals over episodes.

Accuracies of episodes are independent draws of one number, the accuracy on a fresh task; the interval of their mean
is Student's t. Two methods that answered the same episodes are compared by the differences episode by episode, which
leaves out how hard the tasks were and so is much narrower than the two intervals suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval, ``mean ± ci95``.

    Attributes:
        mean: mean of the values, in their unit (accuracies are fractions).
        ci95: half-width of the interval; ``None`` for one value, which says nothing about its spread
            (``null`` in JSON, where NaN is not allowed).
        n: how many values.
    """

    mean: float
    ci95: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.ci95 is None else self.mean - self.ci95

    @property
    def high(self) -> float | None:
        return None if self.ci95 is None else self.mean + self.ci95

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above zero. Never for one value."""
        return self.low is not None and self.low > 0


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of ``values`` with Student's t interval, ``t(0.975, n - 1) · s / √n``.

    Of values ``[T, n]``, such as those of ``T`` stages, it is the mean over these very stages: what lies between them
    is no noise, and ``t(0.975, ν) · √(Σ_j s_j² / n) / T`` has the degrees of freedom of Welch and Satterthwaite.

    Raises:
        ValueError: no values, or a value that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"values of shape {array.shape} must be a list of 1 number or more. Evaluate some episodes.")
    if not np.isfinite(array).all():
        position = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"values[{position}]={array.flat[position]} must be finite. Leave that episode out.")
    parts = np.atleast_2d(array)
    count, n = parts.shape
    if n == 1:
        return Interval(float(array.mean()), None, array.size)
    squares = parts.var(axis=1, ddof=1) / n
    freedom = (n - 1) * squares.sum() ** 2 / (squares**2).sum() if squares.any() else n - 1
    error = math.sqrt(squares.sum()) / count
    return Interval(float(array.mean()), float(stats.t.ppf(0.975, freedom)) * error, array.size)


def paired_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Mean of ``a - b`` with its interval, where ``a[i]`` and ``b[i]`` come from the same episode.

    Raises:
        ValueError: unequal lengths, no values, or a value that is not finite.
    """
    if len(a) != len(b):
        raise ValueError(f"Paired values must be of one length, not {len(a)} and {len(b)}. Use the same episodes.")
    return mean_interval(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))
