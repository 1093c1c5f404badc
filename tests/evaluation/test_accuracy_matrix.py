"""The figures and the picture of a stream."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fewshot_nlp.evaluation.intervals import mean_interval
from fewshot_nlp.evaluation.lifelong import AccuracyMatrix, draw_matrix


def test_figures_are_those_of_the_papers():
    """A matrix of one number a cell, worked out by hand."""
    matrix = np.array([[0.2, 0.3, 0.4], [0.9, 0.5, 0.4], [0.6, 0.8, 0.5], [0.7, 0.6, 1.0]])
    result = AccuracyMatrix(["a", "b", "c"], np.stack([matrix - 0.05, matrix + 0.05], axis=2))
    np.testing.assert_allclose(result.matrix, matrix)
    assert result.average_accuracy.mean == pytest.approx((0.7 + 0.6 + 1.0) / 3)
    assert result.backward_transfer.mean == pytest.approx(((0.7 - 0.9) + (0.6 - 0.8)) / 2)
    assert result.forward_transfer.mean == pytest.approx(((0.5 - 0.3) + (0.5 - 0.4)) / 2)
    assert result.forgetting.mean == pytest.approx(((0.9 - 0.7) + (0.8 - 0.6)) / 2)
    assert result.backward_transfer.ci95 == pytest.approx(0, abs=1e-9)
    assert result.average_accuracy.ci95 == mean_interval(result.accuracies[-1]).ci95 > 0
    content = json.loads(json.dumps(result.to_dict()))
    assert content["start"] == pytest.approx([0.2, 0.3, 0.4])
    assert content["matrix"][1] == pytest.approx([0.6, 0.8, 0.5])
    assert content["episodes"] == 2


def test_forgetting_is_from_the_best_not_from_the_first():
    matrix = np.array([[0.1, 0.1, 0.1], [0.5, 0.6, 0.1], [0.8, 0.4, 0.1], [0.7, 0.5, 0.1]])
    result = AccuracyMatrix(["a", "b", "c"], matrix[..., None].repeat(2, axis=2))
    assert result.forgetting.mean == pytest.approx(((0.8 - 0.7) + (0.6 - 0.5)) / 2)
    assert result.backward_transfer.mean == pytest.approx(((0.7 - 0.5) + (0.5 - 0.4)) / 2)


def test_the_matrix_is_drawn_with_its_values(tmp_path, monkeypatch):
    saved = {}
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: saved.update(figure=self) or save(self, *a, **k))
    values = np.linspace(0, 1, 12).reshape(4, 3)[..., None].repeat(2, axis=2)
    path = draw_matrix(tmp_path / "new" / "matrix.png", AccuracyMatrix(["set-a", "set-b", "set-c"], values), "naive")
    assert imread(path)[..., :3].std() > 0.05
    axes = saved["figure"].axes[0]
    assert [text.get_text() for text in axes.texts] == [f"{100 * v:.1f}" for v in np.linspace(0, 1, 12)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["untrained", "a", "b", "c"]
    assert axes.get_xlabel() and axes.get_ylabel()
    before = path.read_bytes()
    assert draw_matrix(path, AccuracyMatrix(["a", "b", "c"], values), "naive").read_bytes() == before


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match="do not fit 2 stages"):
        AccuracyMatrix(["a", "b"], np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="1 stage is no stream"):
        AccuracyMatrix(["a"], np.zeros((2, 1, 3)))
