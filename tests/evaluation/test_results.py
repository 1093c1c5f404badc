"""Results compared in pairs."""

import dataclasses
import json

import pytest

from fewshot_nlp.evaluation import EvaluationResult, compare
from fewshot_nlp.types import EpisodeSpec


def result_of(accuracies, start=0):
    rows = ((3, 4), (5,), (6,))
    places = range(start, start + len(accuracies))
    specs = [EpisodeSpec("test", i, "animals", ("bus", "car", "dog"), ((0,), (1,), (2,)), rows) for i in places]
    zeros = [0.0] * len(specs)
    return EvaluationResult(specs, [[0]] * len(specs), [[0]] * len(specs), list(accuracies), zeros, 2.0, 1.0)


def test_compare():
    ours = result_of([1.0, 0.8, 0.9, 0.7])
    entry = compare(ours, {"prototypes": result_of([0.9, 0.6, 0.8, 0.7]), "fine-tuning": result_of([0.5, 0.7])})
    assert entry["accuracy"] == pytest.approx(0.85)
    assert entry["ci95"] == pytest.approx(ours.interval.ci95)
    assert entry["episodes"] == 4
    assert entry["adapt_seconds"] == 0.5
    assert entry["baselines"]["prototypes"]["accuracy"] == pytest.approx(0.75)
    assert entry["baselines"]["fine-tuning"]["episodes"] == 2
    assert entry["paired_gain"] == entry["paired_gains"]["prototypes"]
    assert entry["paired_gain"]["mean"] == pytest.approx(0.1)
    # The slow baseline is compared on the two episodes it answered: (0.5 + 0.1) / 2, not 0.85 - 0.6.
    assert entry["paired_gains"]["fine-tuning"]["mean"] == pytest.approx(0.3)
    assert entry["paired_gains"]["fine-tuning"]["episodes"] == 2
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry


def test_compare_refuses_other_episodes():
    ours = result_of([1.0, 0.8])
    with pytest.raises(ValueError, match=r"'prototypes' answered animals/test/7 where .* animals/test/0"):
        compare(ours, {"prototypes": result_of([1.0, 0.8], start=7)})
    other_rows = result_of([1.0, 0.8])
    other_rows.specs[1] = dataclasses.replace(other_rows.specs[1], query=((3, 5), (5,), (6,)))
    with pytest.raises(ValueError, match="other rows"):
        compare(ours, {"prototypes": other_rows})


def test_compare_needs_the_reference():
    with pytest.raises(ValueError, match=r"reference='prototypes' is not among .*'logistic'"):
        compare(result_of([1.0]), {"logistic": result_of([1.0])})
