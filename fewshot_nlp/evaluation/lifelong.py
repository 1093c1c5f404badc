"""What a stream of tasks left behind: the accuracy on every stage after every stage, its figures, and its picture.

With ``R[i][j]`` the accuracy on stage ``j`` once stages ``1..i`` have been learned (``R[0]`` is the untrained start)
and ``T`` stages, after Lopez-Paz and Ranzato 2017 (arXiv:1706.08840) and Chaudhry et al. 2018 (arXiv:1801.10112)::

    average accuracy   1/T     Σ_j     R[T][j]
    backward transfer  1/(T-1) Σ_{j<T} R[T][j] - R[j][j]
    forward transfer   1/(T-1) Σ_{j>1} R[j-1][j] - R[0][j]
    forgetting         1/(T-1) Σ_{j<T} max_{1≤i<T} R[i][j] - R[T][j]

Every row answers the same episodes, so differences are taken episode by episode, and the intervals are those of pairs,
for the mean over the stages at hand: what lies between stages is no noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fewshot_nlp.evaluation.intervals import Interval, mean_interval
from fewshot_nlp.evaluation.plots import save_figure, set_heading


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracies of a stream.

    Attributes:
        stages: names, in the order of learning.
        accuracies: ``[T + 1, T, episodes]`` in [0, 1]: after how many stages, on which stage, in which episode.

    Raises:
        ValueError: one stage alone, or accuracies of another shape.
    """

    stages: Sequence[str]
    accuracies: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.stages)
        if count < 2:
            raise ValueError(f"{count} stage is no stream. Give two or more.")
        if self.accuracies.ndim != 3 or self.accuracies.shape[:2] != (count + 1, count):
            raise ValueError(
                f"accuracies of shape {self.accuracies.shape} do not fit {count} stages. Give one row before the first "
                f"stage and one after each: [{count + 1}, {count}, episodes]."
            )

    @property
    def matrix(self) -> np.ndarray:
        """``R``, ``[T + 1, T]``; its first row is the untrained start."""
        return self.accuracies.mean(axis=2)

    @property
    def average_accuracy(self) -> Interval:
        return mean_interval(self.accuracies[-1])

    @property
    def backward_transfer(self) -> Interval:
        """What later stages added to the accuracy on earlier ones; below zero where they took away."""
        past = np.arange(len(self.stages) - 1)
        return mean_interval(self.accuracies[-1, past] - self.accuracies[past + 1, past])

    @property
    def forward_transfer(self) -> Interval:
        """What earlier stages added, over the untrained start, to the accuracy on a stage not yet learned."""
        later = np.arange(1, len(self.stages))
        return mean_interval(self.accuracies[later, later] - self.accuracies[0, later])

    @property
    def forgotten(self) -> np.ndarray:
        """``[T - 1, episodes]``: for each stage but the last, its best accuracy after a stage minus that at the end."""
        past = np.arange(len(self.stages) - 1)
        best = 1 + self.matrix[1:-1, past].argmax(axis=0)
        return self.accuracies[best, past] - self.accuracies[-1, past]

    @property
    def forgetting(self) -> Interval:
        """The interval takes for given after which stage each was at its best."""
        return mean_interval(self.forgotten)

    def to_dict(self) -> dict[str, Any]:
        """``{"stages", "episodes", "start": [...], "matrix": [[...]], "average_accuracy": {"mean", "ci95"}, ...}``."""
        figures = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")
        found = {name: getattr(self, name) for name in figures}
        start, *rows = self.matrix.tolist()
        return {
            "stages": list(self.stages),
            "episodes": int(self.accuracies.shape[2]),
            "start": start,
            "matrix": rows,
            **{name: {"mean": each.mean, "ci95": each.ci95} for name, each in found.items()},
        }


def draw_matrix(path: str | Path, result: AccuracyMatrix, title: str | None = None) -> Path:
    """Draw ``R`` in percent as a PNG at ``path``: a row after each stage, a column a stage, values in the cells.

    A frame marks the stage that was learned last; cells to its right are of stages not yet learned.

    Returns:
        ``path``.
    """
    values = 100 * result.matrix
    count = len(result.stages)
    size = max(4.8, 1.6 + 0.72 * count)
    figure = Figure(figsize=(size + 1.2, size * 0.86), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    middle = (values.min() + values.max()) / 2
    for (i, j), value in np.ndenumerate(values):
        # Viridis is dark where it is low.
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="black" if value > middle else "white")
    for j in range(count):
        axes.add_patch(Rectangle((j - 0.5, j + 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=2.5))
    # Groups of one data set all begin with its name.
    prefix = result.stages[0].partition("-")[0] + "-"
    shared = all(name.startswith(prefix) for name in result.stages)
    stages = [name.removeprefix(prefix) for name in result.stages] if shared else result.stages
    axes.set_xticks(range(count), stages, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count + 1), ["untrained", *stages])
    axes.set_xlabel("stage that is tested, on held-out examples")
    axes.set_ylabel("stage that was learned last")
    figure.colorbar(image, label="accuracy (% of queries)")
    set_heading(figure, title)
    return save_figure(figure, path)
