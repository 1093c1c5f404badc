"""Tasks side by side are learned and answered as one after another."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from fewshot_nlp.evaluation import evaluate
from fewshot_nlp.functional.rules import sgd
from fewshot_nlp.learners import build_learner, stacking, workers
from fewshot_nlp.learners.workers import side_by_side, workers_for
from fewshot_nlp.models.heads import LinearHead
from fewshot_nlp.types import EpisodeSpec
from tests.tiny import random_episode, tiny_config

SPECS = [EpisodeSpec("test", i, "random", ("class 0", "class 1"), (), ()) for i in range(20)]


def reader(spec):
    return random_episode([1, 2], seed=spec.index)


@pytest.fixture
def two_threads(monkeypatch):
    """Two cores, on which tiny models are worth two workers."""
    monkeypatch.setattr(workers, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(stacking, "MOST_WEIGHTS", 0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "settings", [{"adapter": "prompt_tuning", "num_virtual_tokens": 2}, {"lora_layers_to_transform": [1]}]
)
def test_two_workers_answer_as_one(bert_folder, two_threads, settings):
    learner = build_learner(tiny_config(bert_folder, learner="maml", **settings))
    params = learner.init_params()
    assert workers_for(learner) == 2
    found = evaluate(learner, params, SPECS, reader)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert workers_for(learner) == 1
    alone = evaluate(learner, params, SPECS, reader)
    assert found.specs == alone.specs == SPECS
    assert found.predictions == alone.predictions and found.references == alone.references
    assert found.losses == alone.losses, "to the bit: an episode is one worker's"


@pytest.mark.parametrize("adapter", ["prompt_tuning", "prefix_tuning"])
def test_two_workers_in_inference_mode(bert_folder, two_threads, adapter):
    """It is known to the calling thread alone; what a twin has of its own is recorded in another one."""
    learner = build_learner(tiny_config(bert_folder, learner="maml", adapter=adapter, num_virtual_tokens=2))
    params, episodes = (
        learner.init_params(),
        [random_episode([1, 2], seed=seed, dtype=torch.float32) for seed in range(4)],
    )
    learner.stacking = False
    expected, losses = learner.meta_grad(params, episodes).grads, evaluate(learner, params, SPECS, reader).losses
    with torch.inference_mode():
        found = learner.meta_grad(params, episodes).grads
        assert evaluate(learner, params, SPECS, reader).losses == losses
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_the_work_is_parted_and_the_threads_come_back(two_threads):
    seen, met = set(), Barrier(2)

    def work(mine, item):
        assert torch.get_num_threads() == 1
        if item == 30:
            raise ZeroDivisionError
        if item < 2:
            met.wait(timeout=60)
        seen.add(mine)
        return item

    assert list(side_by_side(work, ["a", "b"], range(25))) == list(range(25))
    assert seen == {"a", "b"}
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(work, ["a", "b"], range(40)))
    assert torch.get_num_threads() == 2
    assert list(side_by_side(lambda mine, item: (mine, item), ["a"], range(2))) == [("a", 0), ("a", 1)]
    for _ in side_by_side(work, ["a", "b"], range(25)):
        break
    assert torch.get_num_threads() == 2, "also where it is left early"


def test_how_many_workers_are_best(bert_folder, two_threads, monkeypatch):
    assert workers_for(build_learner(tiny_config(bert_folder, learner="protonet", head="prototype"))) == 1
    learner = build_learner(tiny_config(bert_folder, learner="maml"))
    assert workers_for(learner) == 2
    assert [workers_for(learner, tasks) for tasks in (1, 2, 3, 4)] == [1, 2, 1, 2], "each has as many tasks"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert workers_for(learner) == 1
    learner.model.module.train()
    assert workers_for(learner) == 1, "dropout draws from one generator"
    learner.model.module.eval()
    for threads, expected in ((3, 3), (4, 4), (5, 1), (6, 3), (8, 4)):
        torch.set_num_threads(threads)
        assert workers_for(learner) == expected, "each has as many cores"
    monkeypatch.setattr(workers, "LEAST_WEIGHTS", 10**6)
    assert workers_for(learner) == 1


SETTINGS = {
    "exact": {},
    "names": {"use_label_names": True, "condition_on_names": True},
    "first order": {"learner": "fomaml", "inner_rule": "adam"},
    "Reptile": {"learner": "reptile"},
    "all weights": {"adapter": "full"},
    "top layer": {"lora_layers_to_transform": [1]},
    "Meta-LSTM": {"learner": "meta_lstm"},
    "bfloat16": {"frozen_dtype": "bfloat16"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_side_by_side_are_those_of_one_after_another(bert_folder, two_threads, settings):
    learner = build_learner(tiny_config(bert_folder, **{"learner": "maml", **settings}))
    params = {name: value + 0.01 * torch.randn_like(value) for name, value in learner.init_params().items()}
    named = "use_label_names" in settings
    episodes = [random_episode([1, 2], seed=i, dtype=torch.float32, names=named) for i in range(6)]
    before, drawn = learner.model.init_params(), torch.get_rng_state()
    assert learner.tasks_at_once(episodes) == 2
    found = learner.meta_grad(params, episodes)
    assert torch.equal(torch.get_rng_state(), drawn)
    again = learner.meta_grad(params, episodes)
    torch.set_num_threads(1)
    assert learner.tasks_at_once(episodes) == 1
    if learner.model.trunk:
        learner.model.trunk.forget()
    alone = learner.meta_grad(params, episodes)
    assert found.episodes == alone.episodes == 6
    for name, grad in alone.grads.items():
        torch.testing.assert_close(found.grads[name], grad)
        assert torch.equal(found.grads[name], again.grads[name])
    for one, other in zip(found.logits, alone.logits, strict=True):
        torch.testing.assert_close(one, other)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.init_params().items())


def test_tasks_go_side_by_side_where_memory_holds_all_their_graphs(bert_folder, two_threads):
    episodes = [random_episode([2, 2], seed=i, dtype=torch.float32) for i in range(4)]
    settings = {"learner": "maml", "inner_steps": 6}
    whole = build_learner(tiny_config(bert_folder, graph_memory_gb=2.0, **settings))
    bytes_a_step = whole.config.graph_memory_gb / whole.steps_in_memory(episodes[0].support)
    for held, expected in ((13, 2), (11, 1), (0, 1)):
        learner = build_learner(tiny_config(bert_folder, graph_memory_gb=held * bytes_a_step, **settings))
        assert learner.tasks_at_once(episodes) == expected
        words = "; 2 tasks side by side" in learner.describe(episodes[0].support, tasks=4)
        assert words == (expected == 2)
        learner.chunk = 1
        assert learner.tasks_at_once(episodes) == (2 if held else 1), "a graph each is enough"
    cheap = build_learner(tiny_config(bert_folder, graph_memory_gb=3 * bytes_a_step, estimator="reptile", **settings))
    assert cheap.tasks_at_once(episodes) == 2
    assert build_learner(tiny_config(bert_folder, learner="anil")).tasks_at_once(episodes) == 1


def test_what_the_trunk_keeps_is_made_before_on_all_cores(bert_folder, two_threads):
    learner = build_learner(tiny_config(bert_folder, learner="maml", lora_layers_to_transform=[1]))
    run, threads = learner.model.trunk._run, []
    learner.model.trunk._run = lambda inputs: threads.append(torch.get_num_threads()) or run(inputs)
    episodes = [random_episode([1, 2], seed=i, dtype=torch.float32) for i in range(2)]
    learner.meta_grad(learner.init_params(), episodes)
    assert set(threads) == {2}
    evaluate(learner, learner.init_params(), SPECS, lambda spec: random_episode([1, 2], 3, 50, dtype=torch.float32))
    assert set(threads) == {2}, "evaluation finds it on all cores, too"
    count = len(threads)
    twin = learner.twin()
    assert twin.model.trunk.known is learner.model.trunk.known
    twin.meta_grad(learner.init_params(), episodes)
    assert len(threads) == count, "nothing is run again"


class Loud(LinearHead):
    """Answers of its own."""

    def logits(self, params, state, features):
        return 2 * super().logits(params, state, features)


def test_side_by_side_all_have_the_head_and_the_rule_that_were_set(bert_folder, two_threads):
    learner = build_learner(tiny_config(bert_folder, learner="maml", inner_steps=2))
    learner.head, learner.rule = Loud(learner.config), sgd({"model.": 3.0, "head.": 3.0})
    params, episodes = learner.init_params(), [random_episode([1, 2], seed=i, dtype=torch.float32) for i in range(4)]
    assert learner.tasks_at_once(episodes) == 2
    found = learner.meta_grad(params, episodes)
    for episode, logits in zip(episodes, found.logits, strict=True):
        alone = learner.predict(params, learner.adapt(params, episode.support), episode.query)
        torch.testing.assert_close(logits, alone)


@pytest.mark.parametrize("name", ["meta_lstm", "leo", "hyper"])
def test_a_twin_has_networks_of_its_own(bert_folder, name):
    """A call writes to a module, also where a rule or a head makes it."""
    learner = build_learner(tiny_config(bert_folder, learner=name, inner_learning_rate=0.1, head_learning_rate=0.1))
    params, episode = learner.init_params(), random_episode([2, 2])
    twin = learner.twin()
    for key, network in learner.networks.modules.items():
        assert twin.networks.modules[key] is not network
        pairs = zip(twin.networks.modules[key].parameters(), network.parameters(), strict=True)
        assert all(one is other for one, other in pairs)
    calls = []
    for network in learner.networks.modules.values():
        network.register_forward_pre_hook(lambda *_: calls.append(1))
    found = twin.meta_grad(params, [episode])
    assert not calls
    expected = learner.meta_grad(params, [episode])
    assert calls
    for key, value in expected.grads.items():
        assert torch.equal(found.grads[key], value)


def test_a_twin_shares_all_but_the_module(bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="maml"))
    learner.chunk = 3
    twin = learner.twin()
    assert twin.chunk == 3 and twin.config == learner.config
    assert twin.model.module is not learner.model.module
    own = dict(learner.model.module.named_parameters())
    assert all(value is own[name] for name, value in twin.model.module.named_parameters())
    assert twin.model.tokenizer is learner.model.tokenizer
    above = build_learner(tiny_config(bert_folder, learner="maml", lora_layers_to_transform=[1])).model
    twin = above.twin()
    assert twin.trunk is not above.trunk
    assert twin.trunk.known is above.trunk.known and twin.trunk.top is above.trunk.top


@pytest.mark.parametrize(
    "settings",
    [
        {"learner": "maml"},
        {"learner": "maml", "lora_layers_to_transform": [1]},
        {"learner": "meta_transfer", "adapter": "none"},
        {"learner": "relation"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_threads_of_the_callers_own_take_turns_at_a_learner(bert_folder, settings):
    """Each call found the parameters of another in the module; layers below stayed replaced for good."""
    learner = build_learner(tiny_config(bert_folder, **settings))
    start, rng = learner.init_params(), torch.Generator().manual_seed(0)
    params = [{n: v + 0.2 * torch.randn(v.shape, generator=rng) for n, v in start.items()} for _ in range(2)]
    episodes = [random_episode([1, 2], seed=seed, dtype=torch.float32) for seed in range(2)]

    def trained(own):
        return [*learner.meta_grad(own, episodes).grads.values()]

    def answered(own):
        return evaluate(learner, own, SPECS[:2], lambda spec: episodes[spec.index]).losses

    expected = [(trained(own), answered(own)) for own in params]
    for module in (learner.model.module, *learner.networks.modules.values()):
        module.register_forward_pre_hook(lambda *_: time.sleep(0.002))
    with ThreadPoolExecutor(4) as pool:
        waiting = [(pool.submit(trained, own), pool.submit(answered, own)) for own in params]
        found = [(gradients.result(), losses.result()) for gradients, losses in waiting]
    for (gradients, losses), (own_gradients, own_losses) in zip(found, expected, strict=True):
        torch.testing.assert_close(gradients, own_gradients)
        assert losses == pytest.approx(own_losses, rel=1e-5)
