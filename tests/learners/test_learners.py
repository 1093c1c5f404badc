"""What learners share, beside the contract: how they are built, and what they report."""

import copy
import pickle

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

from fewshot_nlp.config import LEARNERS
from fewshot_nlp.evaluation import evaluate
from fewshot_nlp.functional.rules import sgd
from fewshot_nlp.learners import FineTuning, build_learner, learner_class
from fewshot_nlp.learners.base import episode_accuracy, episode_loss
from fewshot_nlp.models.heads import LinearHead
from fewshot_nlp.types import OUT_OF_SCOPE, MetaGrad
from tests.tiny import random_batch, random_episode, tiny_config

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [5.0, 0.0]])
LABELS = torch.tensor([0, 1, 1, OUT_OF_SCOPE])


def test_queries_out_of_scope_count_in_neither_loss_nor_accuracy():
    torch.testing.assert_close(episode_loss(LOGITS, LABELS), cross_entropy(LOGITS[:3], LABELS[:3]))
    assert episode_accuracy(LOGITS, LABELS) == pytest.approx(2 / 3)


def test_the_loss_of_half_precision_logits_is_in_single():
    assert episode_loss(LOGITS.bfloat16(), LABELS).dtype == torch.float32
    assert episode_loss(LOGITS.double(), LABELS).dtype == torch.float64


class Loud(LinearHead):
    def logits(self, params, state, features):
        return 2 * super().logits(params, state, features)


@pytest.mark.parametrize("name", ["anil", "protonet"])
def test_what_was_set_on_a_learner_answers_in_its_evaluation(bert_folder, name):
    learner = build_learner(tiny_config(bert_folder, learner=name))
    learner.head = Loud(learner.config)
    if name == "anil":
        learner.rule = sgd({"model.": 3.0, "head.": 3.0})
    params, episode = learner.init_params(), random_episode([2, 1])
    found = evaluate(learner, params, [episode.spec], lambda spec: episode)
    logits = learner.predict(params, learner.adapt(params, episode.support), episode.query)
    assert found.losses == pytest.approx([float(episode_loss(logits, episode.query.labels))], abs=1e-5)


@pytest.mark.parametrize("name", ["relation", "meta_lstm"])
def test_networks_are_drawn_without_a_word_to_accelerators(bert_folder, monkeypatch, name):
    """Their generators would not be put back."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    learner = build_learner(tiny_config(bert_folder, learner=name, inner_learning_rate=0.1))
    learner.twin()
    learner.fixed(learner.init_params())
    assert not seeded and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", LEARNERS)
def test_built_by_name(bert_folder, name):
    learner = build_learner(tiny_config(bert_folder, learner=name))
    assert type(learner) is learner_class(name)
    same = build_learner(learner.config, learner.model)
    assert same.model is learner.model


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", [*LEARNERS, "fine_tuning"])
def test_a_copy_gives_the_same_answers(bert_folder, name, again):
    """Where the class is in no list, too: it is the learner that knows what it is made of."""
    first = build_learner(tiny_config(bert_folder, learner="maml" if name == "fine_tuning" else name))
    first = FineTuning.like(first) if name == "fine_tuning" else first
    second = again(first)
    assert type(second) is type(first)
    assert second.config == first.config
    assert second.model is not first.model
    params, episode = first.init_params(), random_episode([2, 2])
    expected, found = (
        learner.predict(params, learner.adapt(params, episode.support), episode.query) for learner in (first, second)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile"])
def test_without_an_adapter_there_is_nothing_to_adapt(bert_folder, name):
    with pytest.raises(ValueError, match=f"learner='{name}' adapts the adapter, and adapter='none' has none"):
        build_learner(tiny_config(bert_folder, learner=name, adapter="none"))


def test_anil_needs_a_head_with_weights(bert_folder):
    with pytest.raises(ValueError, match=r"learner='anil' adapts the head alone.*Use head='linear'"):
        build_learner(tiny_config(bert_folder, learner="anil", head="prototype"))


def test_anil_leaves_the_adapter_alone(bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="anil"))
    assert learner.adapt(learner.init_params(), random_batch([2, 2])).keys() == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", ["maml", "reptile"])
def test_no_steps_leave_the_start(bert_folder, name):
    learner = build_learner(tiny_config(bert_folder, learner=name, inner_steps=0))
    params = learner.init_params()
    state = learner.adapt(params, random_batch([2, 2]))
    assert all(torch.equal(state[key], value) for key, value in params.items() if key.startswith("model."))


def test_two_step_sizes(bert_folder):
    """With a step of zero the adapter stays, and the head still moves."""
    learner = build_learner(tiny_config(bert_folder, inner_learning_rate=0.0, head_learning_rate=0.5))
    params, support = learner.init_params(), random_batch([2, 3])
    state = learner.adapt(params, support)
    assert all(torch.equal(state[key], value) for key, value in params.items() if key.startswith("model."))
    features = learner.model.features(params, support.inputs)
    start = learner.head.start(params, features, support.labels, 2)
    assert (state["head.weight"] - start["head.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", LEARNERS)
def test_no_episodes_are_a_sum_of_nothing(bert_folder, name):
    """A process may be left without a task in a round."""
    learner = build_learner(tiny_config(bert_folder, learner=name))
    params = learner.init_params()
    nothing = learner.meta_grad(params, [])
    assert nothing.episodes == 0 and nothing.loss == 0 and nothing.logits == []
    assert nothing.grads.keys() == params.keys()
    assert not any(grad.any() for grad in nothing.grads.values())
    one = learner.meta_grad(params, [random_episode([1, 2])])
    total = nothing + one
    assert total.episodes == 1
    assert all(torch.equal(total.grads[key], grad) for key, grad in one.grads.items())


@pytest.mark.parametrize("name", LEARNERS)
def test_dropout_is_never_active(bert_folder, name):
    """What it drops would depend on the process that an episode is dealt to."""
    dropping = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["query"], lora_dropout=0.5)
    learner = build_learner(tiny_config(bert_folder, learner=name), peft_config=dropping)
    first, second = (learner.meta_grad(learner.init_params(), [random_episode([2, 2])]).grads for _ in range(2))
    assert any(grad.any() for grad in first.values())
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_meta_gradients_of_different_learners_do_not_add():
    zero = torch.zeros(())
    one, other = (MetaGrad({name: torch.ones(1)}, zero, zero, 1) for name in ("model.a", "model.b"))
    with pytest.raises(ValueError, match=r"different parameters: \['model.a', 'model.b'\]"):
        one + other


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_mixed_precision_changes_each_gradient_by_hundredths(bert_folder, name):
    """The backbone alone is in bfloat16: a method's own networks, and the way back, lose no digits of their own."""
    settings = {"inner_learning_rate": 0.1, "proximal": 5.0 * (name == "imaml")}
    learner = build_learner(tiny_config(bert_folder, learner=name, **settings))
    rng = torch.Generator().manual_seed(2)
    params = {
        each: value if each in learner.remembered else value + 0.05 * torch.randn(value.shape, generator=rng)
        for each, value in learner.init_params().items()
    }
    episodes = [random_episode([2, 3, 1], seed=seed, dtype=torch.float32) for seed in (1, 2)]
    with torch.autocast("cpu", torch.bfloat16):
        found = learner.meta_grad(params, episodes)
        learner.remember(params, episodes)
    expected = learner.meta_grad(params, episodes)
    assert {value.dtype for value in (*found.grads.values(), *found.logits)} == {torch.float32}
    largest = max(value.norm() for value in expected.grads.values())
    for each, value in expected.grads.items():
        assert (found.grads[each] - value).norm() <= 0.15 * value.norm() + 1e-3 * largest, each
