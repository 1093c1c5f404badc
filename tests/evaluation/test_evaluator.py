"""The evaluator against a learner whose answers are written into its inputs."""

import json
import math

import pytest
import torch

from fewshot_nlp.data.sampler import EpisodeSequence
from fewshot_nlp.evaluation import compare, evaluate, merge
from fewshot_nlp.types import OUT_OF_SCOPE, Batch, Episode, EpisodeSpec

CLASSES = ("bus", "car", "dog", "eel")
WAY, QUERIES = 3, 4


class Scripted:
    """Answers with what stands in ``inputs["answers"]``, sure of it by ``params["head.scale"]``."""

    transductive = False

    def __init__(self):
        self.seen = []

    def init_params(self):
        return {"head.scale": torch.tensor(2.0)}

    def adapt(self, params, support):
        self.seen.append(support.inputs["episode"].item())
        return params["head.scale"]

    def predict(self, params, state, query):
        assert not torch.is_grad_enabled()
        return state * torch.nn.functional.one_hot(query.inputs["answers"], query.n_way)

    def meta_grad(self, params, episodes):
        raise AssertionError("an evaluation takes no gradient")


def spec_at(i, out_of_scope=()):
    classes = tuple(CLASSES[(i + j) % 4] for j in range(WAY))
    return EpisodeSpec("test", i, "animals", classes, ((0,), (1,), (2,)), ((3, 4), (5,), (6,)), out_of_scope)


def reader(spec):
    """Query labels 0, 0, 1, 2; the answers are right but for the first ``index % 3``."""
    labels = torch.tensor([0, 0, 1, 2] + [OUT_OF_SCOPE] * len(spec.out_of_scope))
    answers = labels.clamp(min=0).clone()
    answers[: spec.index % 3] += 1
    support = Batch({"episode": torch.tensor([spec.index])}, torch.arange(WAY), WAY)
    return Episode(spec, support, Batch({"answers": answers}, labels, WAY))


def run(specs, **options):
    learner = Scripted()
    return evaluate(learner, learner.init_params(), specs, reader, **options)


class Sampler(EpisodeSequence):
    """``spec_at`` as a sampler."""

    def _episode(self, index):
        return spec_at(index)


def test_a_sampler_of_known_length_is_its_episodes():
    assert run(Sampler(0, 4)).specs == [spec_at(i) for i in range(4)]
    assert run(spec_at(i) for i in range(4)).specs == [spec_at(i) for i in range(4)]
    assert run(Sampler(0, 4), shard=(1, 2)).specs == [spec_at(1), spec_at(3)]


def test_an_endless_sampler_is_an_error_with_its_remedy():
    with pytest.raises(ValueError, match=r"endless sampler.*\[sampler\[i\] for i in range\(600\)\].*num_episodes"):
        run(Sampler(0, None))


def test_accuracies_and_losses_by_episode():
    specs = [spec_at(i) for i in range(4)]
    result = run(specs)
    assert result.specs == specs
    assert result.accuracies == [1.0, 0.75, 0.5, 1.0]
    right, wrong = (math.log(math.exp(2) + 2) - 2, math.log(math.exp(2) + 2))
    assert result.losses == pytest.approx([right, (3 * right + wrong) / 4, (right + wrong) / 2, right])
    assert result.accuracy == pytest.approx(0.8125)
    assert (result.interval.mean, result.interval.n) == (pytest.approx(0.8125), 4)
    assert result.loss == pytest.approx(sum(result.losses) / 4)
    assert result.adapt_seconds > 0
    assert result.predict_seconds > 0


def test_pooled_metrics_are_over_class_names():
    # Episode 1 is (car, dog, eel) with the first car taken for a dog; episode 4 is the same classes as episode 0.
    result = run([spec_at(1)])
    # F1: car P=1 R=1/2 -> 2/3; dog P=1/2 R=1 -> 2/3; eel 1.
    assert result.metrics == pytest.approx({"accuracy": 0.75, "macro_f1": (2 / 3 + 2 / 3 + 1) / 3})
    # By episode labels class 0 would have F1 of 6/7; by name, bus is right twice and car 3 of 5 are named, 2 missed.
    both = run([spec_at(0), spec_at(1)])
    bus, car, dog, eel = 1.0, 2 * 2 / (2 + 3), 2 * 2 / (3 + 2), 1.0
    assert both.metrics["macro_f1"] == pytest.approx((bus + car + dog + eel) / 4)


def test_out_of_scope_queries_count_only_where_asked():
    plain, scoped = spec_at(1), spec_at(1, out_of_scope=(90, 91))
    result = run([scoped], metrics=("accuracy", "accuracy_with_out_of_scope"))
    assert result.references == [[0, 0, 1, 2, OUT_OF_SCOPE, OUT_OF_SCOPE]]
    assert result.accuracies == [0.75]
    assert result.losses == run([plain]).losses
    assert result.metrics == {"accuracy": 0.75, "accuracy_with_out_of_scope": 0.5}


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_merge_to_the_whole(world_size):
    specs = [spec_at(i) for i in range(5)]
    whole = run(specs)
    parts = [run(specs, shard=(rank, world_size)) for rank in range(world_size)]
    assert [spec.index for spec in parts[0].specs] == list(range(0, 5, world_size))
    merged = merge(parts)
    assert merged.adapt_seconds == pytest.approx(sum(part.adapt_seconds for part in parts))
    for name in ("specs", "predictions", "references", "accuracies", "losses", "metrics"):
        assert getattr(merged, name) == getattr(whole, name)


def test_merge_refuses_what_is_no_set_of_shards():
    specs = [spec_at(i) for i in range(5)]
    parts = [run(specs, shard=(rank, 2)) for rank in range(2)]
    for wrong in ([], parts[::-1], parts[1:] + parts[1:] + parts[1:] + parts[:1]):
        with pytest.raises(ValueError, match="not the shards"):
            merge(wrong)


@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_answer(monkeypatch, logit):
    monkeypatch.setattr(Scripted, "predict", lambda self, params, state, query: torch.full((4, WAY), logit))
    result = run([spec_at(0)], metrics=("accuracy", "macro_f1", "accuracy_with_out_of_scope"))
    # Class 0 is right for two of the four queries, and argmax of NaN is 0.
    assert result.accuracies == [0.0]
    assert math.isnan(result.loss)
    assert set(result.metrics.values()) == {0.0}
    entry = compare(result, {"prototypes": result})
    assert json.loads(json.dumps(entry, allow_nan=False))["loss"] is None


def test_progress_is_shown_only_where_asked(capfd):
    run([spec_at(0)])
    assert capfd.readouterr() == ("", "")
    run([spec_at(0)], progress=True)
    assert "evaluate" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
        ({"metrics": ("bleu",)}, "metric='bleu' is not known"),
        ({"metrics": "accuracy"}, r"metrics='accuracy' must be a list of names: \['accuracy'\]"),
        ({"specs": []}, "specs is empty"),
    ],
)
def test_bad_arguments_fail_before_any_episode(options, message):
    learner = Scripted()
    arguments = {"specs": [spec_at(0)]} | options
    with pytest.raises(ValueError, match=message):
        evaluate(learner, learner.init_params(), reader=reader, **arguments)
    assert not learner.seen


def test_logits_of_a_wrong_shape(monkeypatch):
    monkeypatch.setattr(Scripted, "predict", lambda self, params, state, query: torch.zeros(4, WAY + 1))
    with pytest.raises(ValueError, match=r"animals/test/1: .* shape \(4, 4\), not \(4, 3\)"):
        run([spec_at(1)])
