"""The planner: arithmetic on figures of short loops, and one real trial."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertModel

from fewshot_nlp import plan
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.learners import build_learner, stacking, workers
from fewshot_nlp.learners.planner import Option, Plan, _plan, _trial, example_episode
from tests.tiny import SPECIAL, WORDS, tiny_config, tiny_tokenizer

GB = 2**30


def points(start, slope, seconds=1.0, adapt=0.5):
    """Two short loops whose figures lie on lines."""
    return [
        {"steps": k, "bytes": (start + slope * k) * GB, "seconds": seconds * (1 + k), "adapt_seconds": adapt * k}
        for k in (2, 4)
    ]


TRIAL = {
    "steps_in_memory": 5,
    "links": 10,
    "tasks_at_once": 1,
    "most_at_once": 1,
    "fast_bytes": 0.01 * GB,
    "parameter_bytes": 0.05 * GB,
    "left_bytes": 0.02 * GB,
    "estimators": {"exact": points(0.5, 0.25), "reptile": points(0.2, 0.0, 0.25), "first_order": points(0.3, 0.0, 0.5)},
}


def test_long_loops_follow_from_short_ones():
    found = _plan(FewShotConfig(learner="maml", inner_steps=10), TRIAL, episodes=2)
    sizes = [option.steps_in_memory for option in found.options if option.estimator == "exact"]
    assert sizes == [1, 5, 10]
    assert found.chosen == found.options[1]
    # What is left behind; parameters and both moments; five steps' fast weights; five graphs.
    assert found.chosen.memory_gb == pytest.approx(0.02 + 0.5 + 5 * 0.25 + 3 * 0.05 + 5 * 0.01)
    assert found.chosen.seconds == pytest.approx(2 * (1 + 10 + 5 * 0.5))
    whole = found.options[2]
    assert whole.memory_gb == pytest.approx(0.02 + 0.5 + 10 * 0.25 + 3 * 0.05)
    assert whole.seconds == pytest.approx(2 * 11)
    assert [option.estimator for option in found.options[3:]] == ["reptile", "first_order"]


def test_two_steps_of_one_link_run_again_together():
    config = FewShotConfig(learner="maml", inner_steps=10)
    apart, joined = (_plan(config, {**TRIAL, "links": links}, episodes=1).options for links in (10, 9))
    # An adaptation of one step takes half a second in these figures.
    gained = [one.seconds - other.seconds for one, other in zip(apart[:3], joined[:3], strict=True)]
    assert gained == pytest.approx([0.5, 0.5, 0.0])


def test_more_memory_than_steps_is_all_of_them():
    found = _plan(FewShotConfig(learner="maml", inner_steps=3), TRIAL, episodes=1)
    assert found.chosen.steps_in_memory == 3
    assert [option.steps_in_memory for option in found.options[:3]] == [1, 2, 3]


def test_tasks_side_by_side_take_as_many_times_the_memory():
    both = [
        {**point, "together_seconds": 1.5 * point["seconds"], "together_bytes": 2 * point["bytes"]}
        for point in points(0.5, 0.25)
    ]
    trial = {**TRIAL, "steps_in_memory": 30, "most_at_once": 2, "estimators": {"exact": both}}
    config = FewShotConfig(learner="maml", inner_steps=10)
    for own in (1, 2):
        found = _plan(config, {**trial, "tasks_at_once": own}, episodes=4)
        assert found.chosen.tasks_at_once == own and found.chosen.steps_in_memory == 10
        beside = found.options[-1]
        assert beside.memory_gb == pytest.approx(0.02 + 2 * (0.5 + 10 * 0.25) + 3 * 0.05)
        assert beside.seconds == pytest.approx(2 * 1.5 * 11)
        assert str(beside).startswith("exact, 10 inner steps in memory, 2 tasks at once: ")
        assert [option.tasks_at_once for option in found.options] == [1, 1, 1, 2]
    # Three tasks go as two and one in each micro-round.
    seconds = _plan(config, {**trial, "tasks_at_once": 2}, episodes=3, rounds=5).chosen.seconds
    assert seconds == pytest.approx(5 * 2 * 1.5 * 11)


def test_one_step_has_one_way():
    one = {**TRIAL, "estimators": {"exact": points(0.5, 0.25)[:1]}}
    found = _plan(FewShotConfig(learner="maml", inner_steps=1), one, episodes=1)
    assert len(found.options) == 1
    assert found.chosen.steps_in_memory is None


EXACT, LEAN, CHEAP = Option("exact", 4, 2.0, 1.0), Option("exact", 1, 0.5, 1.5), Option("first_order", None, 0.2, 0.4)
PLAN = Plan(EXACT, (EXACT, LEAN, CHEAP))


@pytest.mark.parametrize(("memory_gb", "expected"), [(5.0, EXACT), (2.0, EXACT), (1.9, LEAN), (0.4, CHEAP)])
def test_the_fastest_that_fits_and_exact_as_long_as_it_does(memory_gb, expected):
    assert PLAN.cheapest(memory_gb) == expected


def test_nothing_fits():
    with pytest.raises(ValueError, match=r"Nothing fits memory_gb=0\.1: the least is 0\.20 GB .* Use fewer examples"):
        PLAN.cheapest(0.1)
    with pytest.raises(ValueError, match="memory_gb=-1"):
        PLAN.cheapest(-1.0)


def test_a_plan_in_words():
    assert str(PLAN).splitlines() == [
        "* exact, 4 inner steps in memory: 2.00 GB, 1.00 s a step",
        "  exact, 1 inner steps in memory: 0.50 GB, 1.50 s a step",
        "  first order: 0.20 GB, 0.40 s a step",
    ]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"n_way": 1}, "n_way=1"),
        ({"k_shot": 0}, "k_shot=0"),
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": []}, "tokens=0"),
        ({"meta_batch_size": 0}, "meta_batch_size=0"),
    ],
)
def test_a_shape_out_of_range(bert_folder, shape, message):
    with pytest.raises(ValueError, match=message):
        plan(tiny_config(bert_folder), **shape)


def test_an_example_has_the_shape_that_was_asked_for(bert_folder):
    learner = build_learner(tiny_config(bert_folder))
    episode = example_episode(learner, n_way=3, k_shot=2, n_query=4, lengths=[3, 7])
    assert episode.support.inputs["attention_mask"].sum(1).tolist() == [3, 7] * 3
    assert episode.query.inputs["input_ids"].shape == (12, 7)
    assert episode.support.labels.tolist() == [0, 0, 1, 1, 2, 2]


SHAPE = {"n_way": 2, "k_shot": 1, "n_query": 1, "lengths": [4, 6]}


@pytest.mark.parametrize(
    ("settings", "ways"),
    [
        ({"learner": "maml", "inner_steps": 6}, {("exact", 1), ("exact", 3), ("exact", 6), ("reptile", None)}),
        ({"learner": "maml", "inner_steps": 5, "estimator": "truncated"}, {("truncated", 1), ("truncated", 5)}),
        ({"learner": "maml", "inner_steps": 3, "step_loss_weights": [1.0, 0.0, 0.0]}, {("exact", 3)}),
        ({"learner": "reptile", "inner_steps": 5}, {("reptile", None)}),
        ({"learner": "protonet", "head": "prototype"}, {(None, None)}),
        ({"learner": "protonet", "head": "prototype", "adapter": "none"}, {(None, None)}),
    ],
)
def test_a_trial_of_every_kind_of_learner(bert_folder, settings, ways):
    config = tiny_config(bert_folder, **settings)
    found = _plan(config, json.loads(json.dumps(_trial(config, SHAPE, 1, "cpu"))), episodes=1)
    assert ways <= {(option.estimator, option.steps_in_memory) for option in found.options}
    assert all(option.seconds > 0 for option in found.options)
    assert found.chosen in found.options


def test_a_trial_of_one_stack(bert_folder):
    config = tiny_config(bert_folder, learner="maml", inner_steps=3)
    found = _plan(config, json.loads(json.dumps(_trial(config, SHAPE, 5, "cpu"))), episodes=5)
    assert found.chosen.tasks_at_once == 5 and found.chosen.seconds > 0
    learner = build_learner(config)
    episode = example_episode(learner, **SHAPE)
    task = (3 * learner._graph_bytes(episode.support) + learner._graph_bytes(episode.query)) / 2**30
    some = replace(config, graph_memory_gb=3.5 * task)
    found = _plan(some, json.loads(json.dumps(_trial(some, SHAPE, 5, "cpu"))), episodes=5)
    assert found.chosen.tasks_at_once == 3, "as three go together, there are two rounds"


def test_a_trial_on_two_cores(bert_folder, monkeypatch):
    monkeypatch.setattr(workers, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(stacking, "MOST_WEIGHTS", 0)
    torch.set_num_threads(2)
    config = tiny_config(bert_folder, learner="maml", inner_steps=3)
    found = _plan(config, json.loads(json.dumps(_trial(config, SHAPE, 4, "cpu"))), episodes=4)
    assert found.chosen.tasks_at_once == 2 and found.chosen.seconds > 0
    lean = replace(config, graph_memory_gb=0.0)
    found = _plan(lean, json.loads(json.dumps(_trial(lean, SHAPE, 4, "cpu"))), episodes=4)
    assert found.chosen.tasks_at_once == 1 and found.chosen.steps_in_memory == 1
    assert {option.tasks_at_once for option in found.options} == {1, 2}


@pytest.mark.parametrize(
    "settings", [{"learner": "anil"}, {"learner": "maml", "inner_rule": "meta_sgd"}, {"learner": "hyper"}]
)
def test_reptile_is_not_proposed_where_it_would_train_nothing(bert_folder, settings):
    config = tiny_config(bert_folder, inner_steps=2, **settings)
    assert set(_trial(config, SHAPE, 1, "cpu")["estimators"]) == {"exact", "first_order"}


@pytest.mark.slow
def test_more_steps_in_memory_take_more_of_it(tmp_path):
    """On a model large enough that its graphs are more than noise."""
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=384,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = tiny_config(str(tmp_path), learner="maml", adapter="lora", inner_steps=8)
    found = plan(settings, n_way=5, k_shot=4, n_query=4, tokens=16)
    by_size = {option.steps_in_memory: option for option in found.options if option.estimator == "exact"}
    assert by_size[8].memory_gb > 2 * by_size[1].memory_gb > 0.004
    assert by_size[8].seconds < by_size[1].seconds, "nothing is run twice"
    learner = build_learner(settings)
    episode = example_episode(learner, 5, 4, 4, [16], seed=1)
    held = learner.steps_in_memory(episode.support)
    assert held >= 8
    assert found.chosen == by_size[8]


def test_settings_that_no_learner_can_have_are_refused_as_they_are_elsewhere(tmp_path, bert_folder):
    with pytest.raises(OSError, match=r"^Cannot load the backbone"):
        plan(FewShotConfig(model_name_or_path=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match=r"^learner='anil' adapts the head alone"):
        plan(tiny_config(bert_folder, learner="anil", head="prototype"))


def test_a_trial_that_dies_is_told_from_one_that_is_refused(bert_folder, monkeypatch):
    def died(code, said=""):
        return lambda *_, **__: subprocess.CompletedProcess([], code, "", said)

    monkeypatch.setattr(subprocess, "run", died(-9))
    with pytest.raises(RuntimeError, match="killed, most likely for want of memory"):
        plan(tiny_config(bert_folder))
    monkeypatch.setattr(subprocess, "run", died(1, "Traceback\nTypeError: no"))
    with pytest.raises(RuntimeError, match="trial failed: TypeError: no"):
        plan(tiny_config(bert_folder))
