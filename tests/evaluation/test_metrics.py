import socket

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, r2_score

from fewshot_nlp.evaluation.metrics import METRICS, Accuracy, load_metric


@pytest.fixture
def labels():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 4, 200)
    return np.where(generator.random(200) < 0.7, references, generator.integers(0, 4, 200)), references


def test_agree_with_scikit_learn(labels):
    predictions, references = labels
    assert load_metric("accuracy").compute(predictions=predictions, references=references) == {
        "accuracy": pytest.approx(accuracy_score(references, predictions))
    }
    assert load_metric("macro_f1").compute(predictions=predictions, references=references) == {
        "macro_f1": pytest.approx(f1_score(references, predictions, average="macro"))
    }


@pytest.mark.parametrize("name", METRICS)
def test_batches_add_up(name, labels):
    predictions, references = labels
    metric = load_metric(name)
    for start in range(0, 200, 50):
        metric.add_batch(predictions=predictions[start : start + 50], references=references[start : start + 50])
    assert metric.compute() == load_metric(name).compute(predictions=predictions, references=references)
    # A metric starts afresh after compute.
    assert metric.compute(predictions=[1, 2], references=[1, 2]) == {name: 1.0}


def test_r2_agrees_with_scikit_learn():
    references = np.random.default_rng(0).normal(size=50)
    predictions = references + 0.5 * np.random.default_rng(1).normal(size=50)
    found = load_metric("r2").compute(predictions=predictions, references=references)
    assert found == {"r2": pytest.approx(r2_score(references, predictions))}
    assert np.isnan(METRICS["r2"].score(np.array([1.0, np.nan]), np.array([1.0, 2.0])))
    assert np.isnan(METRICS["r2"].score(np.array([1.0]), np.array([1.0])))


def test_out_of_scope():
    predictions, references = [0, 1, 1, -1], [0, 0, -1, -1]
    named = ("accuracy", "accuracy_with_out_of_scope", "macro_f1")
    values = {name: METRICS[name]().compute(predictions=predictions, references=references)[name] for name in named}
    # Without the two out-of-scope queries one of two is right; with them two of four. F1: class 0 has P = 1, R = 1/2.
    assert values == pytest.approx({"accuracy": 0.5, "accuracy_with_out_of_scope": 0.5, "macro_f1": 2 / 3})
    counted = METRICS["accuracy_with_out_of_scope"]().compute(predictions=[0, 1], references=[0, -1])
    assert counted == {"accuracy_with_out_of_scope": 0.5}


def test_neither_network_nor_files(monkeypatch, tmp_path, labels):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    predictions, references = labels
    for name in METRICS:
        assert name in load_metric(name).compute(predictions=predictions, references=references)
    assert not (tmp_path / "metrics").exists()


def test_on_disk_where_asked(tmp_path):
    metric = Accuracy(keep_in_memory=False, cache_dir=str(tmp_path))
    assert metric.compute(predictions=[1, 0], references=[1, 1]) == {"accuracy": 0.5}
    assert not list(tmp_path.rglob("*.arrow"))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"metric='acuracy' is not known. Use one of: accuracy,"):
        load_metric("acuracy")
