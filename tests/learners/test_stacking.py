"""Tasks in one stack have the gradient that they have one after another."""

import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from fewshot_nlp.evaluation import evaluate
from fewshot_nlp.learners import build_learner, stacking
from fewshot_nlp.learners.stacking import stacked, stacks
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.backbone import ATTENTION
from fewshot_nlp.types import EpisodeSpec
from tests.learners.test_engine import SHAPES, Pictures, pictures
from tests.tiny import random_episode, tiny_config

SETTINGS = {
    "LoRA": {},
    "soft prompt": {"adapter": "prompt_tuning", "num_virtual_tokens": 2},
    "prefix": {"adapter": "prefix_tuning", "num_virtual_tokens": 2},
    "full fine-tuning": {"adapter": "full", "inner_learning_rate": 0.02},
    "top layer": {"lora_layers_to_transform": [1]},
    "first order": {"learner": "fomaml"},
    "truncated": {"estimator": "truncated", "truncated_steps": 2},
    "Reptile": {"learner": "reptile"},
    "ANIL": {"learner": "anil"},
    "ProtoMAML": {"learner": "protomaml"},
    "BOIL": {"learner": "boil"},
    "CAVIA": {"learner": "cavia"},
    "MAML++": {"learner": "mamlpp"},
    "Meta-SGD": {"learner": "meta_sgd"},
    "Meta-transfer": {"learner": "meta_transfer", "adapter": "none"},
    "momentum": {"inner_rule": "momentum"},
    "Adam": {"inner_rule": "adam", "inner_learning_rate": 0.05},
    "clipping and decay": {"inner_max_grad_norm": 0.01, "inner_weight_decay": 0.1},
    "proximal": {"proximal": 0.3},
    "head of zeros": {"head": "linear", "head_init": "zero"},
    "prototypes": {"head": "prototype"},
    "names as examples": {"use_label_names": True},
    "centred": {"center_features": True, "normalize_features": True},
}
REFUSED = {
    "Meta-LSTM": ({"learner": "meta_lstm"}, "lstm_cell"),
    "normalised Reptile": ({"learner": "normalised_reptile"}, "data-dependent"),
    "iMAML": ({"learner": "imaml"}, "conjugate gradients"),
    "names": ({"use_label_names": True, "condition_on_names": True}, "names of each task's classes"),
}


def learner_and_params(folder, **settings):
    learner = build_learner(tiny_config(folder, **settings))
    return in_double_precision(learner)


def in_double_precision(learner):
    learner.model.module.double()
    rng = torch.Generator().manual_seed(0)
    start = {name: value.double() for name, value in learner.init_params().items()}
    return learner, {n: v + 0.1 * torch.randn(v.shape, generator=rng, dtype=v.dtype) for n, v in start.items()}


def one_by_one_and_stacked(learner, params, episodes):
    for learner.stacking in (False, True):
        yield learner.meta_grad(params, episodes)


def assert_same(alone, together, tolerance=1e-9):
    scale = torch.sqrt(sum(value.square().sum() for value in alone.grads.values()))
    assert scale > 0
    for name, value in alone.grads.items():
        assert (together.grads[name] - value).norm() <= tolerance * scale, name
    torch.testing.assert_close(together.loss, alone.loss)
    torch.testing.assert_close(together.accuracy, alone.accuracy)
    assert together.episodes == alone.episodes
    for one, other in zip(together.logits, alone.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_stack_has_the_gradient_of_its_tasks(bert_folder, settings):
    settings = {"learner": "maml", "inner_steps": 4, "inner_learning_rate": 0.2, **settings}
    learner, params = learner_and_params(bert_folder, **settings)
    episodes = [random_episode([2, 1], seed=seed, names="use_label_names" in settings) for seed in range(5)]
    learner.stacking = True
    assert learner.tasks_at_once(episodes) == 5, learner._refusal
    assert "5 tasks in one stack" in learner.describe(learner._known(episodes[0].support), 5)
    alone, together = one_by_one_and_stacked(learner, params, episodes)
    assert_same(alone, together)
    for learner.chunk in (1, 3):
        assert_same(alone, learner.meta_grad(params, episodes))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_backbone(bert_folder, shape):
    config, targets = SHAPES[shape]
    config._attn_implementation = ATTENTION
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        module = AutoModel.from_config(config).eval().requires_grad_(False)
        adapted = get_peft_model(module, LoraConfig(r=2, target_modules=targets, task_type="FEATURE_EXTRACTION"))
    settings = tiny_config(bert_folder, learner="maml", inner_steps=3, inner_learning_rate=0.1)
    kind = Pictures if shape == "vit" else FewShotModel
    learner, params = in_double_precision(build_learner(settings, kind(adapted.eval(), None, settings)))
    episodes = [random_episode([2, 1], seed=seed) for seed in range(3)]
    if shape == "vit":
        rng = torch.Generator().manual_seed(1)
        episodes = [replace(e, support=pictures(e.support, rng), query=pictures(e.query, rng)) for e in episodes]
    alone, together = one_by_one_and_stacked(learner, params, episodes)
    assert learner._refusal == (None,)
    # Llama's norms are in single precision, whatever the weights are in.
    assert_same(alone, together, 1e-6 if shape == "llama" else 1e-9)


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_stacked_goes_one_by_one_and_says_so(bert_folder, settings, reason):
    learner, params = learner_and_params(bert_folder, inner_steps=2, **settings)
    episodes = [random_episode([2, 1], seed=seed, names="use_label_names" in settings) for seed in range(3)]
    alone, together = one_by_one_and_stacked(learner, params, episodes)
    assert all(torch.equal(value, together.grads[name]) for name, value in alone.grads.items())
    assert reason in learner._refusal[0]
    words = learner.describe(learner._known(episodes[0].support), 3)
    assert "one task at a time" in words and reason in words


def test_a_gradient_that_would_differ_is_found_out(bert_folder, monkeypatch):
    learner, _ = learner_and_params(bert_folder, learner="maml")
    own = learner._features

    def mixed(*args):
        # Of a stack, the first dimension is the tasks'.
        found = own(*args)
        return found + found.mean(dim=0, keepdim=True)

    monkeypatch.setattr(learner, "_features", mixed)
    learner.stacking = True
    episodes = [random_episode([2, 1], seed=seed) for seed in range(2)]
    assert learner.tasks_at_once(episodes) == 1
    assert "would be off" in learner._refusal[0]


def test_neighbours_that_are_alike_go_together(bert_folder):
    kinds = [[1, 1], [1, 1], [2, 1], [1, 1], [1, 1], [1, 1]]
    episodes = [random_episode(counts, seed=seed) for seed, counts in enumerate(kinds)]
    assert [len(part) for part in stacks(episodes, 2)] == [2, 1, 2, 1]
    assert [episode for part in stacks(episodes, 9) for episode in part] == episodes
    learner, params = learner_and_params(bert_folder, learner="maml")
    alone, together = one_by_one_and_stacked(learner, params, episodes)
    assert_same(alone, together)


def test_texts_of_unlike_length_are_padded_behind():
    short, long = random_episode([1, 1], seed=0), random_episode([1, 1], seed=1)
    cut = {name: tensor[:, :4] for name, tensor in short.support.inputs.items()}
    cut["attention_mask"] = cut["attention_mask"].clone()
    whole = stacked([replace(short, support=replace(short.support, inputs=cut)), long])
    assert whole.support.inputs["input_ids"].shape == (2, 2, 6)
    assert torch.equal(whole.support.inputs["attention_mask"][0, :, :4], cut["attention_mask"])
    assert not whole.support.inputs["attention_mask"][0, :, 4:].any()
    assert len(whole.support) == 2 and whole.support.teaches


def test_as_many_tasks_as_memory_holds_the_graphs_of(bert_folder, monkeypatch):
    settings = {"learner": "maml", "inner_steps": 4}
    episodes = [random_episode([2, 1], seed=seed, dtype=torch.float32) for seed in range(6)]
    whole = build_learner(tiny_config(bert_folder, **settings, graph_memory_gb=1.0))
    bytes_a_step = 1.0 / whole.steps_in_memory(episodes[0].support)
    for held, size in ((24, 6), (20, 3), (12, 3), (8, 2), (7, 1), (1, 1)):
        learner = build_learner(tiny_config(bert_folder, graph_memory_gb=1.01 * held * bytes_a_step, **settings))
        learner.stacking = True
        assert learner.tasks_at_once(episodes) == size, held
    assert whole.tasks_at_once(episodes) == 6, "so small a network is called for longer than it computes"
    monkeypatch.setattr(stacking, "MOST_WEIGHTS", 0)
    assert whole.tasks_at_once(episodes) == 1, "a CPU gains nothing"


def test_dropout_is_drawn_one_task_at_a_time(bert_folder):
    learner, _ = learner_and_params(bert_folder, learner="maml")
    learner.model.module.train()
    learner.stacking = True
    assert learner.tasks_at_once([random_episode([2, 1], seed=seed) for seed in range(2)]) == 1
    assert "dropout" in learner._refusal[0]


@pytest.mark.parametrize(
    "settings", [{}, {"lora_layers_to_transform": [1]}, {"head": "prototype"}, {"learner": "reptile"}]
)
def test_answers_of_a_stack_are_those_of_its_tasks(bert_folder, monkeypatch, settings):
    learner, params = learner_and_params(bert_folder, **{"learner": "maml", "inner_steps": 3, **settings})
    counts = [[1, 2]] * 20 + [[2, 2], [1, 2]]
    specs = [EpisodeSpec("test", i, "random", ("class 0", "class 1"), (), ()) for i in range(len(counts))]
    sizes, own = [], learner.adapt_stack
    monkeypatch.setattr(learner, "adapt_stack", lambda p, part: sizes.append(len(part)) or own(p, part))
    found = []
    for learner.stacking in (False, True):
        found.append(evaluate(learner, params, specs, lambda spec: random_episode(counts[spec.index], seed=spec.index)))
    assert sizes == [16, 4], "two more go alone"
    alone, together = found
    assert together.specs == alone.specs == specs
    assert together.predictions == alone.predictions and together.references == alone.references
    assert together.losses == pytest.approx(alone.losses, rel=1e-9)
    assert together.adapt_seconds > 0 and together.predict_seconds > 0


def test_what_no_task_changes_is_answered_from_what_is_kept(bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="anil"))
    learner.stacking = True
    assert learner.answers_at_once([random_episode([1, 1], seed=seed) for seed in range(3)]) == 1
