"""The external memory against its equations, written out entry by entry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.learners import build_learner
from fewshot_nlp.learners.memory import CLASSES, MEANS, TASKS
from fewshot_nlp.types import OUT_OF_SCOPE, EpisodeSpec
from tests.tiny import HIDDEN, random_episode, tiny_config
from tests.training.toy import ToySampler, toy_args

KINDS = {"capacity": 6, "neighbours": 3}


def episode_of(names, seed=0, counts=None):
    episode = random_episode(counts or [2] * len(names), seed=seed)
    return replace(episode, spec=EpisodeSpec("train", seed, "pool", tuple(names), (), ()))


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


@pytest.fixture
def learner(bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="memory", learner_kwargs=KINDS))
    learner.model.module.double()
    return learner


@pytest.fixture
def params(learner):
    return {name: value.double() for name, value in learner.init_params().items()}


def test_the_memory_is_as_precise_as_the_model(learner):
    assert {value.dtype for value in learner.init_params().values()} == {torch.float64}
    learner.meta_grad(learner.init_params(), [episode_of("ab")])


@pytest.fixture
def filled(learner, params):
    """Parameters away from their start, and a memory of four classes of two tasks, with two places left."""
    rng = torch.Generator().manual_seed(5)
    moved = {n: v + 0.1 * torch.randn(v.shape, generator=rng, dtype=v.dtype) for n, v in params.items()}
    moved |= {name: params[name] for name in learner.remembered}
    return {**moved, **learner.remember(moved, [episode_of("ab", 1), episode_of("cd", 2)])}


def by_hand(learner, params, support):
    """Class means ``c' - o`` and the centre ``o``, one entry at a time."""
    features = normalize(learner.model.features(params, support.inputs), dim=-1)
    read = {name.removeprefix("learner.retrieval."): v for name, v in params.items()}
    task = features.mean(dim=0)
    entries = [m for m in range(len(params[MEANS])) if params[CLASSES][m] > 0]
    near = {m: cosine(task, params[TASKS][m]) for m in entries}
    own = [features[support.labels == label].mean(dim=0) for label in range(support.n_way)]
    reach = {m: near[m] + max(cosine(mean, params[MEANS][m]) for mean in own) for m in entries}
    entries = sorted(entries, key=lambda m: -reach[m])[: learner.options.neighbours]
    means = {m: params[MEANS][m] / params[MEANS][m].norm() for m in entries}
    total = sum(torch.exp(read["log_task_scale"].exp() * near[m]) for m in entries)
    weight = {m: torch.exp(read["log_task_scale"].exp() * near[m]) / total for m in entries}
    centre = read["centring"] * sum(weight[m] * means[m] for m in entries)
    found = []
    for label in range(support.n_way):
        mean, count = own[label], int((support.labels == label).sum())
        alike = {m: read["log_class_scale"].exp() * cosine(mean - centre, means[m] - centre) for m in entries}
        total = sum(weight[m] * alike[m].exp() for m in entries)
        prior = sum(weight[m] * alike[m].exp() / total * means[m] for m in entries)
        extra = read["log_count"].exp()
        found.append((count * mean + extra * prior) / (count + extra) - centre)
    return torch.stack(found), centre


def test_it_is_its_equations(learner, filled):
    episode = episode_of("xyz", 7, [1, 4, 2])
    state = learner.adapt(filled, episode.support)
    weights, centre = by_hand(learner, filled, episode.support)
    torch.testing.assert_close(state["centre"], centre, rtol=1e-10, atol=1e-12)
    queries = normalize(learner.model.features(filled, episode.query.inputs), dim=-1)
    expected = torch.stack([torch.stack([cosine(q - centre, w) for w in weights]) for q in queries])
    found = learner.predict(filled, state, episode.query)
    torch.testing.assert_close(found, filled["head.log_scale"].exp() * expected, rtol=1e-10, atol=1e-12)


def test_with_an_empty_memory_it_is_nearest_class_mean(learner, params):
    episode = episode_of("xyz", 7, [1, 4, 2])
    state = learner.adapt(params, episode.support)
    features = normalize(learner.model.features(params, episode.support.inputs), dim=-1)
    queries = normalize(learner.model.features(params, episode.query.inputs), dim=-1)
    means = torch.stack([features[episode.support.labels == label].mean(dim=0) for label in range(3)])
    expected = params["head.log_scale"].exp() * queries @ normalize(means, dim=-1).T
    torch.testing.assert_close(learner.predict(params, state, episode.query), expected, rtol=1e-12, atol=1e-12)
    grads = learner.meta_grad(params, [episode]).grads
    assert all(grad.isfinite().all() for grad in grads.values())


def test_only_the_nearest_tasks_are_retrieved(learner, filled):
    """Of four entries three are read, and the fourth may be of any length and direction but theirs."""
    episode = episode_of("xyz", 7)
    features = normalize(learner.model.features(filled, episode.support.inputs), dim=-1)
    task = features.mean(dim=0)
    far = {**filled, TASKS: filled[TASKS].clone(), MEANS: filled[MEANS].clone()}
    far[TASKS][1] = far[MEANS][1] = -task
    expected = learner.adapt(far, episode.support)["centre"]
    far[MEANS][1] += 0.1 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(learner.adapt(far, episode.support)["centre"], expected)
    far[TASKS][1] = far[MEANS][1] = task
    assert not torch.allclose(learner.adapt(far, episode.support)["centre"], expected)


def test_what_is_written(learner, params):
    """Newest first; the mean over support and query; queries out of scope left out; nothing else touched."""
    first, second = episode_of("ab", 1), episode_of("cd", 2)
    labels = second.query.labels.clone()
    labels[-1] = OUT_OF_SCOPE
    second = replace(second, query=replace(second.query, labels=labels))
    before = {name: value.clone() for name, value in params.items()}
    found = learner.remember(params, [first, second])
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert found.keys() == {MEANS, TASKS, CLASSES}

    both = {
        name: torch.cat([second.support.inputs[name], _padded(second.query.inputs[name])]) for name in ("input_ids",)
    }
    both["attention_mask"] = torch.cat([second.support.inputs["attention_mask"],
                                        _padded(second.query.inputs["attention_mask"])])  # fmt: skip
    features = normalize(learner.model.features(params, both), dim=-1)
    every = torch.cat([second.support.labels, labels])
    for label in (0, 1):
        torch.testing.assert_close(found[MEANS][label], features[every == label].mean(dim=0))
    support = normalize(learner.model.features(params, second.support.inputs), dim=-1)
    for row in (0, 1):
        torch.testing.assert_close(found[TASKS][row], normalize(support.mean(dim=0), dim=-1))
    assert (found[CLASSES] > 0).tolist() == [True] * 4 + [False] * 2
    assert not found[MEANS][4:].any()
    again = learner.remember({**params, **learner.remember(params, [first])}, [second])
    assert all(torch.equal(again[name], found[name]) for name in found)


def _padded(rows):
    return torch.nn.functional.pad(rows, (0, 1))


def test_a_class_met_again_is_averaged_in_and_the_longest_unseen_is_forgotten(learner, params):
    first = learner.remember(params, [episode_of("ab", 1), episode_of("cd", 2)])
    c, d, a, b = (first[MEANS][row] for row in range(4))
    other = episode_of("ax", 3)
    alone = learner.remember(params, [other])[MEANS]
    second = learner.remember({**params, **first}, [other])
    rate = learner.options.rate
    expected = torch.stack([(1 - rate) * a + rate * alone[0], alone[1], c, d, b, torch.zeros_like(a)])
    torch.testing.assert_close(second[MEANS], expected)
    # Six places, seven classes: "b" was met only once, before "c" and "d".
    third = learner.remember({**params, **second}, [episode_of("yz", 4)])
    assert torch.equal(third[MEANS][2:], second[MEANS][:4])
    assert second[CLASSES][4] not in third[CLASSES]


def test_a_task_larger_than_the_memory_fills_it(learner, params):
    found = learner.remember(params, [episode_of("abcdefgh", 1)])
    assert found[MEANS].shape == (6, HIDDEN) and (found[CLASSES] > 0).all()


def test_in_training_a_task_does_not_see_its_own_classes(learner, filled):
    learner.options.neighbours = 6
    task = episode_of("ax", 9)
    blank = filled[CLASSES] == filled[CLASSES][2]  # "c d a b": the class "a"
    without = {**filled, MEANS: filled[MEANS].masked_fill(blank[:, None], 0)}
    found, expected = learner.meta_grad(filled, [task]), learner.meta_grad(without, [task])
    for name in filled:
        assert torch.equal(found.grads[name], expected.grads[name])
    assert all(not found.grads[name].any() for name in learner.remembered)
    seen = learner.predict(filled, learner.adapt(filled, task.support), task.query)
    assert not torch.allclose(seen, found.logits[0])


def test_names_describe_the_task_where_they_are_given(bert_folder, params):
    learner = build_learner(tiny_config(bert_folder, learner="memory", learner_kwargs=KINDS, use_label_names=True))
    learner.model.module.double()
    episode = episode_of("ab", 1)
    names = {name: rows[[1, 3]] for name, rows in episode.support.inputs.items()}
    told = replace(episode, support=replace(episode.support, names=names))
    expected = normalize(normalize(learner.model.features(params, names), dim=-1).mean(dim=0), dim=-1)
    torch.testing.assert_close(learner.remember(params, [told])[TASKS][0], expected)


def reader(spec):
    episode = random_episode([2, 1, 3], seed=spec.index, dtype=torch.float32)
    return replace(episode, spec=replace(spec, classes=("a", "b", str(spec.index))))


def trainer_of(bert_folder, folder, **settings):
    from fewshot_nlp.training import FewShotTrainer

    learner = build_learner(tiny_config(bert_folder, learner="memory", learner_kwargs=KINDS))
    args = toy_args(folder, meta_batch_size=2, weight_decay=0.5, learning_rate=0.01, **settings)
    return FewShotTrainer(learner, args, ToySampler(), reader)


def test_the_trainer_writes_it_and_its_optimiser_does_not(bert_folder, tmp_path):
    trainer = trainer_of(bert_folder, tmp_path, max_steps=1)
    trainer.train()
    now = trainer.detached_params()
    empty = {**now, **{name: torch.zeros_like(now[name]) for name in trainer.learner.remembered}}
    expected = trainer.learner.remember(empty, [reader(trainer.train_sampler[i]) for i in (0, 1)])
    assert expected[MEANS].any()
    for name in trainer.learner.remembered:
        assert torch.equal(now[name], expected[name])
        assert trainer.params[name] not in trainer.optimizer.state
    assert trainer.params["learner.retrieval.log_count"] in trainer.optimizer.state


def test_a_resumed_run_remembers_what_an_unbroken_one_does(bert_folder, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = trainer_of(bert_folder, tmp_path / "whole", max_steps=4, **saving)
    whole.train()
    resumed = trainer_of(bert_folder, tmp_path / "other", max_steps=4, **saving)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    for name, value in whole.detached_params().items():
        assert torch.equal(resumed.detached_params()[name], value)


def test_it_is_saved_with_the_adapter(bert_folder, tmp_path):
    trainer = trainer_of(bert_folder, tmp_path / "run", max_steps=2)
    trainer.train()
    FewShotAdapter(trainer.learner, trainer.detached_params()).save_pretrained(tmp_path / "saved")
    loaded = FewShotAdapter.from_pretrained(tmp_path / "saved")
    for name in trainer.learner.remembered:
        assert torch.equal(loaded.params[name], trainer.detached_params()[name])
        assert loaded.params[name].any()


@pytest.mark.parametrize("wrong", [{"capacity": 0}, {"neighbours": 0}, {"rate": 0.0}, {"rate": 1.5}])
def test_settings_out_of_range_are_refused(bert_folder, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        build_learner(tiny_config(bert_folder, learner="memory", learner_kwargs=wrong))
