import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fewshot_nlp.evaluation.plots import _running_mean, curves_from_log_history, learning_curve

ACCURACY = {
    "train": [(i, 0.8 + 0.001 * (i % 7)) for i in range(1, 61)],
    "validation": [(0, 0.9), (30, 0.92), (60, 0.91)],
}


@pytest.fixture
def figure(monkeypatch):
    """The figure that was saved last."""
    saved = {}
    save = Figure.savefig

    def keep(self, *args, **options):
        saved["figure"] = self
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return lambda: saved["figure"]


def test_what_is_drawn(tmp_path, figure):
    path = learning_curve(
        tmp_path / "new" / "curve.png",
        ACCURACY,
        baselines={"untrained, validation": 0.905},
        loss={"train": [(1, 0.5), (2, 0.4)]},
        title="MAML",
    )
    pixels = imread(path)
    assert pixels.shape[0] > 600
    assert pixels[..., :3].std() > 0.05
    top, bottom = figure().axes
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("accuracy (% of queries)", "cross-entropy (nats)")
    assert bottom.get_xlabel() == "training step (meta-updates)"
    lines = {line.get_label(): line for line in top.lines}
    assert {"train (running mean)", "validation", "untrained, validation: 90.5 %"} < set(lines)
    assert lines["validation"].get_ydata().tolist() == [90.0, 92.0, 91.0]
    baseline = lines["untrained, validation: 90.5 %"]
    assert list(baseline.get_ydata()) == [90.5, 90.5]
    # The baseline belongs to validation, not to the "train" in "untrained".
    assert baseline.get_color() == lines["validation"].get_color() != lines["train (running mean)"].get_color()


def test_accuracy_alone_has_one_panel(tmp_path, figure):
    learning_curve(tmp_path / "curve.png", {"train": [], "validation": [(5, 0.9)]}, loss={"train": []})
    (panel,) = figure().axes
    assert panel.get_xlabel()
    assert [line.get_label() for line in panel.lines] == ["validation"]


def test_a_long_title_is_not_cut(tmp_path, figure):
    title = "Reptile with normalised aggregation, normalisation layers, home_intents, clinc150, banking77, huffpost"
    learning_curve(tmp_path / "curve.png", ACCURACY, title=title)
    drawn, whole = figure()._suptitle, figure().bbox
    assert drawn.get_text().replace("\n", " ") == title
    shown = drawn.get_window_extent()
    assert whole.x0 <= shown.x0 and shown.x1 <= whole.x1


def test_equal_runs_leave_equal_files(tmp_path):
    one, two = (learning_curve(tmp_path / name, ACCURACY).read_bytes() for name in ("1.png", "2.png"))
    assert one == two


def test_pyplot_is_left_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    learning_curve(tmp_path / "curve.png", ACCURACY)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="No accuracy to draw"):
        learning_curve(tmp_path / "curve.png", {"train": []})


def test_running_mean():
    assert _running_mean(np.array([0.0, 3.0, 6.0, 0.0])).tolist() == [1.5, 3.0, 3.0, 3.0]


def test_a_step_that_was_not_finite_is_left_out(tmp_path, figure):
    curve = [(i, 0.5) for i in range(40)] + [(40, float("nan"))]
    learning_curve(tmp_path / "curve.png", {"train": curve}, loss={"train": [(0, float("inf"))]})
    (panel,) = figure().axes
    assert all(np.isfinite(line.get_ydata()).all() and len(line.get_xdata()) == 40 for line in panel.lines)


def test_curves_from_log_history():
    train = [{"loss": 1.0, "accuracy": 0.5, "grad_norm": 3.0, "step": 5}, {"loss": 0.8, "accuracy": 0.6, "step": 10}]
    one = {"eval_accuracy": 0.7, "eval_loss": 0.4, "eval_1-shot_accuracy": 0.7, "eval_1-shot_loss": 0.4, "step": 10}
    end = {"train_loss": 0.9, "train_runtime": 3.0, "step": 10}
    accuracy, loss = curves_from_log_history([*train, one, end])
    assert accuracy == {"train": [(5, 0.5), (10, 0.6)], "validation": [(10, 0.7)]}
    assert loss == {"train": [(5, 1.0), (10, 0.8)], "validation": [(10, 0.4)]}
    two = one | {"eval_5-shot_accuracy": 0.9, "eval_5-shot_loss": 0.2}
    accuracy, _ = curves_from_log_history([*train, two])
    assert set(accuracy) == {"train", "validation, 1-shot", "validation, 5-shot"}
    assert accuracy["validation, 5-shot"] == [(10, 0.9)]
    assert curves_from_log_history([]) == ({}, {})
