"""Tasks in one stack have the gradient that they have one after another."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from fewshot_nlp.evaluation import evaluate
from fewshot_nlp.functional.memory import graph_bytes
from fewshot_nlp.functional.outer import adapt, leaf, leaves
from fewshot_nlp.learners import build_learner, stacking
from fewshot_nlp.learners.stacking import stacked, stacks, trial
from fewshot_nlp.types import OUT_OF_SCOPE, Batch, EpisodeSpec
from tests.learners.test_engine import SHAPES, learner_of, pictures
from tests.tiny import random_episode, tiny_config, tiny_tokenizer

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
    "Meta-LSTM": {"learner": "meta_lstm", "inner_learning_rate": 0.02, "head_learning_rate": 0.02},
    "normalised Reptile": {"learner": "normalised_reptile"},
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
    "LEO": ({"learner": "leo"}, "more than its estimator's"),
    "joint training": ({"learner": "joint"}, "more than its estimator's"),
    "iMAML": ({"learner": "imaml"}, "conjugate gradients"),
    "names": ({"use_label_names": True, "condition_on_names": True}, "names of each task's classes"),
}


def test_what_is_looked_at_does_not_grow_with_the_steps(bert_folder, monkeypatch):
    """Each look at a number waits for an accelerator."""
    looks, look = [], torch.Tensor.__bool__

    def counted(tensor):
        looks.append(1)
        return look(tensor)

    found = []
    for steps in (2, 8):
        learner, params = learner_and_params(bert_folder, learner="maml", inner_steps=steps)
        learner.stacking, episodes = True, [random_episode([1, 1], seed=seed) for seed in range(3)]
        learner.meta_grad(params, episodes)
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "__bool__", counted)
            learner.meta_grad(params, episodes)
        found.append(len(looks))
        looks.clear()
    assert found[0] == found[1]


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
    assert learner.tasks_at_once(episodes) == 5, learner._trials
    assert "5 tasks in one stack" in learner.describe(learner._known(episodes[0].support), 5)
    alone, together = one_by_one_and_stacked(learner, params, episodes)
    assert_same(alone, together)
    for learner.chunk in (1, 3):
        assert_same(alone, learner.meta_grad(params, episodes))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_backbone(bert_folder, shape):
    learner, params = learner_of(shape, bert_folder, steps=3)
    episodes = [random_episode([2, 1], seed=seed) for seed in range(3)]
    if shape == "vit":
        rng = torch.Generator().manual_seed(1)
        episodes = [replace(e, support=pictures(e.support, rng), query=pictures(e.query, rng)) for e in episodes]
    alone, together = one_by_one_and_stacked(learner, params, episodes)
    assert [*learner._trials.values()] == [None]
    # Llama's norms are in single precision, whatever the weights are in.
    assert_same(alone, together, 1e-6 if shape == "llama" else 1e-9)


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_stacked_goes_one_by_one_and_says_so(bert_folder, settings, reason):
    learner, params = learner_and_params(bert_folder, inner_steps=2, **settings)
    episodes = [random_episode([2, 1], seed=seed, names="use_label_names" in settings) for seed in range(3)]
    alone, together = one_by_one_and_stacked(learner, params, episodes)
    assert all(torch.equal(value, together.grads[name]) for name, value in alone.grads.items())
    words = learner.describe(learner._known(episodes[0].support), 3)
    assert "one task at a time" in words and reason in words


MIXED = {
    "features": ("_features", lambda found: found + found.mean(dim=0, keepdim=True)),
    # As the first of them has it.
    "one tensor": (
        "_inner_gradient",
        lambda found: ({n: g[:1].expand_as(g) if "lora_A" in n else g for n, g in found[0].items()}, found[1]),
    ),
    "answers": ("_answered", lambda found: (found[0], found[1] + found[1].detach().mean(dim=0, keepdim=True))),
}


@pytest.mark.parametrize("case", MIXED)
def test_a_gradient_that_would_differ_is_found_out(bert_folder, monkeypatch, case):
    learner, _ = learner_and_params(bert_folder, learner="maml")
    name, mix = MIXED[case]
    own = getattr(learner, name)

    def mixed(*args, **kwargs):
        found = own(*args, **kwargs)
        # Of a stack, the first dimension is the tasks'.
        return mix(found) if learner.model._of_tasks else found

    monkeypatch.setattr(learner, name, mixed)
    learner.stacking = True
    episodes = [random_episode([2, 1], seed=seed) for seed in range(2)]
    assert learner.tasks_at_once(episodes) == 1
    assert "would be off" in learner._refusal(episodes[0].support)


def test_a_method_that_looks_at_numbers_goes_one_by_one(bert_folder, monkeypatch):
    learner, params = learner_and_params(bert_folder, learner="maml")
    own = learner._step

    def looking(params, k, grads, slots, fast, loss):
        return own(params, k, grads, slots, fast, loss) if loss > -1 else (grads, slots)

    monkeypatch.setattr(learner, "_step", looking)
    episodes = [random_episode([2, 1], seed=seed) for seed in range(3)]
    alone, together = one_by_one_and_stacked(learner, params, episodes)
    assert all(torch.equal(value, together.grads[name]) for name, value in alone.grads.items())
    words = learner.describe(episodes[0].support, 3)
    assert "one task at a time, as RuntimeError says: vmap: It looks like" in words


def test_what_was_tried_does_not_depend_on_the_data(bert_folder):
    learner, _ = learner_and_params(bert_folder, learner="protomaml")
    learner.stacking = True
    # As many rows of one text, all of one class, as a run shows to say how it computes.
    same = Batch(learner.model.any_texts(4, 8), torch.zeros(4, dtype=torch.long), 2)
    assert "5 tasks in one stack" in learner.describe(same, 5)
    assert learner.describe(same, 1) == learner.describe(same)
    nothing = replace(random_episode([2, 1]).support, labels=torch.full((3,), float("nan")))
    assert trial(learner, nothing) is None


def test_out_of_memory_is_no_reason(bert_folder, monkeypatch):
    learner, _ = learner_and_params(bert_folder, learner="maml")

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(learner, "_stack_grad", full)
    with pytest.raises(torch.OutOfMemoryError):
        trial(learner, random_episode([2, 1]).support)


def test_batch_statistics_are_of_each_task(folders):
    """Those of the layers below the first trained one, too."""
    learner = build_learner(tiny_config(folders["image"], learner="maml", adapter="full", layers_to_train=[1]))
    conv = build_learner(tiny_config("conv4", learner="maml", layers_to_train=[3], inner_steps=2))
    for each in (learner, conv):
        each, params = in_double_precision(each)
        episodes = [random_episode([2, 1], seed=seed, kind="image") for seed in range(3)]
        if each is conv:
            assert each.model.transductive and each.model.trunk is not None
            episodes = [enlarged(episode) for episode in episodes]
        each.stacking = True
        assert each.tasks_at_once(episodes) == 3, each._trials
        assert_same(*one_by_one_and_stacked(each, params, episodes))
    more = [enlarged(random_episode(counts, seed=9, kind="image")) for counts in ([2, 1], [2, 2])]
    assert [len(part) for part in stacks(conv, more, 9)] == [1, 1], "a copy would be in its statistics"


def enlarged(episode):
    """The same images in the size that conv-4 takes."""

    def grown(batch):
        return replace(batch, inputs={n: nn.functional.interpolate(t, 28) for n, t in batch.inputs.items()})

    return replace(episode, support=grown(episode.support), query=grown(episode.query))


def test_in_half_precision(bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="maml", frozen_dtype="bfloat16"))
    params = {name: value + 0.1 for name, value in learner.init_params().items()}
    episodes = [random_episode([2, 1], seed=seed, dtype=torch.float32) for seed in range(3)]
    assert learner.tasks_at_once(episodes) == 3
    alone, together = one_by_one_and_stacked(learner, params, episodes)
    scale = sum(value.norm() for value in alone.grads.values())
    assert sum((together.grads[n] - value).norm() for n, value in alone.grads.items()) < 0.1 * scale
    with torch.autocast("cpu", torch.bfloat16):
        assert learner.tasks_at_once(episodes) == 3
    assert [*learner._trials] == ["cpu bfloat16", "cpu bfloat16torch.bfloat16"], "each is tried"


def test_regressions(folders):
    learner = build_learner(tiny_config(folders["vector"], learner="maml", task="regression", inner_learning_rate=0.05))
    learner, params = in_double_precision(learner)
    episodes = [random_episode([2, 1], seed=seed, kind="vector", task="regression") for seed in range(3)]
    learner.stacking = True
    assert learner.tasks_at_once(episodes) == 3, learner._trials
    assert_same(*one_by_one_and_stacked(learner, params, episodes))
    unlike = [random_episode([n, 1], seed=n, kind="vector", task="regression") for n in (1, 2)]
    assert [len(part) for part in stacks(learner, unlike, 9)] == [1, 1], "every number is a target"
    assert_same(*one_by_one_and_stacked(learner, params, unlike))


def test_queries_of_no_class_of_the_episode(bert_folder):
    learner, params = learner_and_params(bert_folder, learner="maml")
    episodes = [random_episode([2, 1], seed=seed) for seed in range(3)]
    for seed, episode in enumerate(episodes):
        episode.query.labels[: seed + 1] = OUT_OF_SCOPE
    assert_same(*one_by_one_and_stacked(learner, params, episodes))


@pytest.mark.parametrize("layers", [[0, 1], [1]])
def test_a_stack_in_inference_mode(bert_folder, layers):
    learner, params = learner_and_params(bert_folder, learner="maml", lora_layers_to_transform=layers)
    specs = [EpisodeSpec("test", i, "random", ("class 0", "class 1"), (), ()) for i in range(3)]
    learner.stacking = True
    with torch.inference_mode():
        found = evaluate(learner, params, specs, lambda spec: random_episode([2, 1], seed=spec.index))
    learner.stacking = False
    alone = evaluate(learner, params, specs, lambda spec: random_episode([2, 1], seed=spec.index))
    assert found.losses == pytest.approx(alone.losses, rel=1e-9)


def of(counts, seed=0, n_query=2):
    return random_episode(counts, n_query, seed)


def test_neighbours_that_are_alike_go_together(bert_folder):
    episodes = [of([1, 1]), of([1, 2]), of([2, 1, 1]), of([20, 20]), of([1, 1], n_query=1), of([1, 1], n_query=1)]
    learner, params = learner_and_params(bert_folder, learner="maml")
    assert [len(part) for part in stacks(learner, episodes[:4], 2)] == [2, 1, 1]
    assert [len(part) for part in stacks(learner, episodes[3:], 9)] == [2, 1], "more than half would be for show"
    assert [episode for part in stacks(learner, episodes, 9) for episode in part] == episodes
    alone, together = one_by_one_and_stacked(learner, params, episodes)
    assert_same(alone, together)
    assert [len(logits) for logits in together.logits] == [4, 4, 6, 4, 2, 2]


UNEQUAL = {
    "MAML": {},
    "ProtoMAML": {"learner": "protomaml"},
    "prototypes": {"head": "prototype"},
    "names as the start": {"use_label_names": True, "head": "linear", "head_init": "names"},
    "learned weight of a name": {"use_label_names": True, "learn_label_name_weight": True},
    "multi-step loss": {"learner": "mamlpp"},
}


@pytest.mark.parametrize("settings", UNEQUAL.values(), ids=UNEQUAL)
def test_tasks_of_more_and_of_fewer_examples(bert_folder, settings):
    learner, params = learner_and_params(bert_folder, **{"learner": "maml", "inner_steps": 3, **settings})
    shapes = [([1, 1], 3), ([3, 2], 2), ([2, 2], 1)]
    episodes = [random_episode(c, n, seed, names="use_label_names" in settings) for seed, (c, n) in enumerate(shapes)]
    learner.stacking = True
    assert [len(part) for part in stacks(learner, episodes, learner.tasks_at_once(episodes))] == [3], learner._trials
    alone, together = one_by_one_and_stacked(learner, params, episodes)
    assert_same(alone, together)
    assert [len(logits) for logits in together.logits] == [6, 4, 2]


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
    support, query = episodes[0].support, episodes[0].query
    bytes_a_task = (4 * whole._graph_bytes(support) + whole._graph_bytes(query)) / 2**30
    for held, size in ((6, 6), (5, 3), (3, 3), (2, 2), (1, 1), (0, 1)):
        learner = build_learner(tiny_config(bert_folder, graph_memory_gb=1.01 * held * bytes_a_task, **settings))
        learner.stacking = True
        assert learner.tasks_at_once(episodes) == size, held
    assert whole.tasks_at_once(episodes) == 6, "so small a network is called for longer than it computes"
    monkeypatch.setattr(stacking, "MOST_WEIGHTS", 0)
    assert whole.tasks_at_once(episodes) == 1, "a CPU gains nothing"


def test_a_stack_takes_what_its_largest_task_takes_as_many_times(bert_folder):
    many, long = random_episode([8, 8], seed=0), random_episode([2, 2], seed=1)
    cut = {name: tensor[:, :3] for name, tensor in many.support.inputs.items()}
    many = replace(many, support=replace(many.support, inputs=cut))
    learner, _ = learner_and_params(bert_folder, learner="maml", inner_steps=2)
    learner.stacking = True
    query = learner._graph_bytes(many.query)
    filled = 2 * learner._graph_bytes(many.support, 16, 6) + query
    own = 2 * learner._graph_bytes(many.support) + query
    assert own < filled
    for bytes_held, size in ((2.1 * own, 1), (2.1 * filled, 2)):
        learner.config = replace(learner.config, graph_memory_gb=bytes_held / 2**30)
        assert learner.tasks_at_once([many, long]) == size


def test_long_texts_take_more_a_token(tmp_path):
    """The scores of attention grow with the square of the length."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=100, max_position_embeddings=256, **sizes)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    learner = build_learner(tiny_config(str(tmp_path), learner="maml", max_length=256))

    def counted(length):
        batch = Batch(learner.model.any_texts(4, length), torch.arange(4) % 2, 2)
        theta = leaves(learner.init_params())
        first, second = learner.links(batch)[:2]
        carry = adapt([first], theta).map(leaf)
        return graph_bytes(lambda: second(theta, carry, True), learner.model.module.parameters()), batch

    for length in (16, 64, 128, 224):
        wanted, batch = counted(length)
        assert learner._graph_bytes(batch) == pytest.approx(wanted, rel=0.05), length
    assert learner._graph_bytes(batch) > 1.5 * 14 * learner._graph_bytes(counted(16)[1])


def test_dropout_is_drawn_one_task_at_a_time(bert_folder):
    learner, _ = learner_and_params(bert_folder, learner="maml")
    learner.model.module.train()
    learner.stacking = True
    assert learner.tasks_at_once([random_episode([2, 1], seed=seed) for seed in range(2)]) == 1
    assert "dropout" in learner._refusal(random_episode([2, 1]).support)


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
    assert sizes == [16, 6]
    alone, together = found
    assert together.specs == alone.specs == specs
    assert together.predictions == alone.predictions and together.references == alone.references
    assert together.losses == pytest.approx(alone.losses, rel=1e-9)
    assert together.adapt_seconds > 0 and together.predict_seconds > 0


def test_what_no_task_changes_is_answered_from_what_is_kept(bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="anil"))
    learner.stacking = True
    assert learner.answers_at_once([random_episode([1, 1], seed=seed) for seed in range(3)]) == 1
