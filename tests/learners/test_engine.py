"""Step by step or all at once, the meta-gradient is the same: over backbones, adapters, rules and batches."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, ViTConfig

from fewshot_nlp.config import DEFAULT_BACKBONE, FewShotConfig
from fewshot_nlp.functional.outer import Carry
from fewshot_nlp.functional.rules import RULES
from fewshot_nlp.functional.trunk import ROWS
from fewshot_nlp.learners import build_learner
from fewshot_nlp.learners.base import episode_loss
from fewshot_nlp.learners.planner import example_episode
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.backbone import ATTENTION, packaged_backbone
from fewshot_nlp.models.heads import LinearHead
from fewshot_nlp.types import Batch, Episode
from tests.learners.test_meta_gradients import assert_equal, learner_and_params
from tests.tiny import HIDDEN, SPECIAL, WORDS, random_episode, tiny_config

COUNTS = [1, 3, 2]
SMALL = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SHAPES = {
    "bert": (BertConfig(vocab_size=len(SPECIAL + WORDS), **SMALL), ["query", "value"]),
    "gpt2": (GPT2Config(vocab_size=len(SPECIAL + WORDS), n_embd=HIDDEN, n_layer=2, n_head=2), ["c_attn"]),
    "llama": (
        LlamaConfig(vocab_size=len(SPECIAL + WORDS), num_key_value_heads=1, **SMALL),
        ["q_proj", "v_proj"],
    ),
    "vit": (ViTConfig(image_size=8, patch_size=4, **SMALL), ["q_proj", "v_proj"]),
}


class Pictures(FewShotModel):
    """Features of images: the mean over patches."""

    def features(self, params, inputs):
        body = {name.removeprefix("model."): value for name, value in params.items() if name.startswith("model.")}
        return torch.func.functional_call(self.module, body, kwargs=inputs).last_hidden_state.mean(dim=1)


def unrolled(learner, params, episodes):
    """The whole of a task in one graph, and torch's own derivative of it."""
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    for episode in episodes:
        theta = {name: value.clone().requires_grad_() for name, value in params.items()}
        carry = None
        for link in learner.links(episode.support, apart=True):
            carry = link(theta, carry, True)
        state = learner._state(theta, carry, episode.support)
        loss = episode_loss(learner.predict(theta, state, episode.query), episode.query.labels)
        for name, grad in zip(theta, torch.autograd.grad(loss, [*theta.values()], materialize_grads=True), strict=True):
            total[name] += grad
    return total


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("adapter", ["lora", "prompt_tuning", "prefix_tuning", "full"])
def test_step_by_step_is_exact(bert_folder, adapter, steps):
    rate = 0.02 if adapter == "full" else 0.2
    learner, params = learner_and_params(
        bert_folder, learner="maml", adapter=adapter, inner_steps=steps, inner_learning_rate=rate, num_virtual_tokens=2
    )
    episodes = [random_episode(COUNTS, seed=seed) for seed in (0, 1)]
    expected = unrolled(learner, params, episodes)
    for learner.chunk in (1, 3, None):
        assert_equal(learner.meta_grad(params, episodes).grads, expected)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_a_linear_head_alone(bert_folder, steps):
    learner, params = learner_and_params(bert_folder, learner="anil", inner_steps=steps)
    episodes = [random_episode(COUNTS)]
    expected = unrolled(learner, params, episodes)
    for learner.chunk in (1, 3, None):
        assert_equal(learner.meta_grad(params, episodes).grads, expected)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "meta_sgd", "step_rates"])
@pytest.mark.parametrize("head", ["linear", "prototype"])
def test_every_rule_with_decay_and_clipping(bert_folder, rule, head):
    learner, params = learner_and_params(
        bert_folder,
        learner="maml",
        head=head,
        inner_rule=rule,
        inner_steps=4,
        inner_learning_rate=0.05,
        inner_weight_decay=0.1,
        inner_max_grad_norm=0.5,
        proximal=0.3,
    )
    episodes = [random_episode(COUNTS)]
    expected = unrolled(learner, params, episodes)
    for learner.chunk in (1, 3):
        assert_equal(learner.meta_grad(params, episodes).grads, expected)
    if rule in ("meta_sgd", "step_rates"):
        assert all(expected[name].abs().max() > 0 for name in params if name.startswith("rule."))


def learner_of(shape, folder, steps):
    """MAML with LoRA on a random backbone of ``SHAPES``, in double precision, and where to differentiate it."""
    config, targets = SHAPES[shape]
    config._attn_implementation = ATTENTION
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT's own, about what it reads of transformers and about GPT-2's transposed weights.
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        module = AutoModel.from_config(config).eval().requires_grad_(False)
        adapted = get_peft_model(module, LoraConfig(r=2, target_modules=targets, task_type="FEATURE_EXTRACTION"))
    kind = Pictures if shape == "vit" else FewShotModel
    settings = tiny_config(folder, learner="maml", inner_steps=steps, inner_learning_rate=0.1)
    learner = build_learner(settings, kind(adapted.eval(), None, settings))
    adapted.double()
    rng = torch.Generator().manual_seed(1)
    params = {
        name: value.double() + 0.1 * torch.randn(value.shape, generator=rng, dtype=torch.float64)
        for name, value in learner.init_params().items()
    }
    return learner, params


@pytest.mark.parametrize("shape", SHAPES)
def test_every_backbone(bert_folder, shape):
    learner, params = learner_of(shape, bert_folder, steps=5)
    rng = torch.Generator().manual_seed(2)
    episode = random_episode(COUNTS)
    if shape == "vit":
        episode = Episode(episode.spec, *(pictures(batch, rng) for batch in (episode.support, episode.query)))
    expected = unrolled(learner, params, [episode])
    for learner.chunk in (1, 2):
        assert_equal(learner.meta_grad(params, [episode]).grads, expected)


def pictures(batch, rng):
    pixels = torch.randn(len(batch), 3, 8, 8, generator=rng, dtype=torch.float64)
    return Batch({"pixel_values": pixels}, batch.labels, batch.n_way)


def test_dropout_draws_the_same_numbers_again(bert_folder):
    learner, params = learner_and_params(bert_folder, learner="maml", inner_steps=4)
    learner.model.module.train()
    episodes = [random_episode(COUNTS, seed=3)]
    found = {}
    for learner.chunk in (1, 2, None):
        found[learner.chunk] = learner.meta_grad(params, episodes)
    for chunk in (1, 2):
        assert_equal(found[chunk].grads, found[None].grads)
        assert torch.equal(found[chunk].loss, found[None].loss)
    learner.model.module.eval()
    assert learner.meta_grad(params, episodes).loss != found[None].loss


def test_truncated_stands_between_first_order_and_exact(bert_folder):
    episode = random_episode(COUNTS)

    def grads(**settings):
        learner, params = learner_and_params(bert_folder, learner="maml", inner_steps=3, **settings)
        learner.chunk = 2
        return learner.meta_grad(params, [episode]).grads

    assert_equal(grads(estimator="truncated", truncated_steps=3), grads())
    assert_equal(grads(estimator="truncated", truncated_steps=9), grads())
    assert_equal(grads(estimator="truncated", truncated_steps=0), grads(estimator="first_order"))
    exact = grads()
    errors = [
        sum((g - exact[n]).square().sum() for n, g in grads(estimator="truncated", truncated_steps=m).items())
        for m in range(4)
    ]
    assert errors[0] > errors[2] > errors[3] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"learner": "maml"},
        {"learner": "anil"},
        {"learner": "maml", "inner_weight_decay": 0.3},
        {"learner": "maml", "head_learning_rate": 0.0},
        {"learner": "boil", "head_learning_rate": 0.0},
    ],
    ids=str,
)
def test_implicit_is_exact_where_the_loop_has_converged(bert_folder, settings):
    """Far enough along a strongly convex inner problem, the path no longer matters."""
    settings = {
        "inner_steps": 250, "inner_learning_rate": 0.2, "proximal": 2.0, "conjugate_gradient_steps": 200,
        "head_scale": 1.0, **settings,
    }  # fmt: skip
    episode = random_episode(COUNTS)
    exact, params = learner_and_params(bert_folder, **settings)
    exact.chunk = 1
    implicit, _ = learner_and_params(bert_folder, estimator="implicit", **settings)
    found = implicit.meta_grad(params, [episode])
    expected = exact.meta_grad(params, [episode])
    assert_equal(found.grads, expected.grads, tolerance=1e-6)
    torch.testing.assert_close(found.loss, expected.loss)


class Seeing(LinearHead):
    """The same head of zeros, which does not say that its first step leaves the features as they are."""

    blind = False


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"inner_steps": 2},
        {"inner_steps": 1},
        {"inner_max_grad_norm": 0.1},
        {"inner_weight_decay": 0.3},
        {"proximal": 0.4},
        {"estimator": "truncated", "truncated_steps": 3},
        {"estimator": "truncated", "truncated_steps": 1},
        {"estimator": "first_order"},
        {"step_loss_weights": [0.5, 0.1, 0.0, 0.4]},
    ],
    ids=str,
)
def test_the_second_step_sees_what_the_first_one_saw(bert_folder, rule, settings):
    """From a head of zeros the first step moves the head alone: one pass serves two steps, to the same gradient."""
    own = {"learner": "maml", "head_init": "zero", "inner_steps": 4, "inner_rule": rule, "inner_learning_rate": 0.05}
    settings = {**own, **settings}
    learner, params = learner_and_params(bert_folder, **settings)
    rng = torch.Generator().manual_seed(0)
    params = {n: value + 0.1 * torch.randn(value.shape, generator=rng).double() for n, value in params.items()}
    episode = random_episode(COUNTS)
    found, state = learner.meta_grad(params, [episode]), learner.adapt(params, episode.support)
    learner.head = Seeing(learner.config)
    for learner.chunk in (1, None):
        expected = learner.meta_grad(params, [episode])
        assert_equal(found.grads, expected.grads, tolerance=1e-11)
        torch.testing.assert_close(found.loss, expected.loss)
    assert_equal(state, learner.adapt(params, episode.support), tolerance=1e-11)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 3),
        ({"head_init": "prototype"}, 4),
        ({"inner_weight_decay": 0.1}, 4),
        ({"learner": "meta_lstm"}, 4),
        ({"learner": "anil"}, 1),
    ],
    ids=str,
)
def test_how_often_the_support_set_is_read(bert_folder, settings, passes):
    learner, params = learner_and_params(
        bert_folder, **{"learner": "maml", "head_init": "zero", "inner_steps": 4, **settings}
    )
    seen, support = [], random_episode(COUNTS).support
    read = learner.model.features
    learner.model.features = lambda *args: seen.append(1) or read(*args)
    learner.adapt(params, support)
    assert len(seen) == passes
    seen.clear()
    learner.model.module.train()
    learner.adapt(params, support)
    assert len(seen) == (1 if settings.get("learner") == "anil" else 4), "dropout draws anew in each step"


def test_implicit_needs_a_pull(bert_folder):
    with pytest.raises(ValueError, match="needs proximal above 0"):
        build_learner(tiny_config(bert_folder, learner="maml", estimator="implicit"))


@pytest.mark.parametrize("rule", ["meta_sgd", "step_rates"])
def test_implicit_refuses_rates_that_it_cannot_train(bert_folder, rule):
    with pytest.raises(ValueError, match=f"'implicit' cannot train the rates of inner_rule='{rule}'.*Use 'sgd'"):
        build_learner(tiny_config(bert_folder, learner="imaml", inner_rule=rule))


def test_implicit_where_nothing_moves_is_the_gradient_at_the_start(bert_folder):
    settings = {"learner": "anil", "head_learning_rate": 0.0, "proximal": 1.0}
    exact, params = learner_and_params(bert_folder, **settings)
    implicit, _ = learner_and_params(bert_folder, estimator="implicit", **settings)
    episode = random_episode(COUNTS)
    assert_equal(implicit.meta_grad(params, [episode]).grads, exact.meta_grad(params, [episode]).grads)


def test_the_count_of_memory_takes_no_longer_texts_than_training(bert_folder):
    """Ten virtual tokens before eight of a text are all that 18 positions hold."""
    settings = {"adapter": "prompt_tuning", "num_virtual_tokens": 10, "max_length": 8, "inner_steps": 3}
    learner = build_learner(tiny_config(bert_folder, **settings))
    lengths, read = [], learner.model.any_texts
    learner.model.any_texts = lambda count, tokens: lengths.append(tokens) or read(count, tokens)
    assert learner.steps_in_memory(random_episode([2, 2]).support) > 1
    assert lengths == [8]


@pytest.mark.parametrize("learner", ["reptile", "protonet", "imaml", "joint", "maml"])
def test_dropout_follows_from_the_episode_alone(bert_folder, learner):
    built, params = learner_and_params(bert_folder, learner=learner)
    built.model.module.train()
    episode, other = random_episode(COUNTS), random_episode(COUNTS)
    other = replace(other, spec=replace(other.spec, index=other.spec.index + 1))
    state = torch.get_rng_state()
    found = [built.meta_grad(params, [each]).grads for each in (episode, other, episode)]
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(found[0], found[2])
    assert any((found[0][name] - found[1][name]).abs().max() > 1e-6 for name in params)


@pytest.mark.parametrize("learner", ["maml", "protonet", "anil", "domain_adversarial"])
def test_episodes_may_be_made_in_inference_mode(bert_folder, learner):
    built, params = learner_and_params(bert_folder, learner=learner)
    with torch.inference_mode():
        made = random_episode(COUNTS)
    assert_equal(built.meta_grad(params, [made]).grads, built.meta_grad(params, [random_episode(COUNTS)]).grads)


def test_only_carries_outlive_a_step(bert_folder):
    """What is kept of a step is its fast weights and the rule's memory: nothing with a graph, nothing large."""
    learner, params = learner_and_params(bert_folder, learner="maml", inner_rule="adam", inner_steps=3)
    links = learner.links(random_episode(COUNTS).support)
    carry: Carry | None = None
    for link in links:
        carry = link({n: v.requires_grad_() for n, v in params.items()}, carry, False)
        fast = sum(value.numel() for value in carry.fast.values())
        assert sum(value.numel() for value in carry.tensors()) == 3 * fast
        carry = carry.map(torch.Tensor.detach)
        carry = carry.map(torch.Tensor.requires_grad_)


def test_the_chunk_follows_from_the_memory_allowed(bert_folder):
    """All steps where they fit, one at a time where they do not, and the same whatever episode came first."""
    settings = {"learner": "maml", "inner_steps": 6}
    episodes = [random_episode([2, 2], seed=1), random_episode([9, 9], seed=2)]
    plenty = build_learner(tiny_config(bert_folder, **settings))
    assert plenty.steps_in_memory(episodes[0].support) > 6
    none = build_learner(tiny_config(bert_folder, graph_memory_gb=0.0, **settings))
    assert none.steps_in_memory(episodes[0].support) == 1
    some = [build_learner(tiny_config(bert_folder, graph_memory_gb=0.0003, **settings)) for _ in range(2)]
    found = [
        [learner.steps_in_memory(e.support) for e in order]
        for learner, order in zip(some, (episodes, episodes[::-1]), strict=True)
    ]
    assert found[0] == found[1][::-1]
    assert 6 > found[0][0] > found[0][1] >= 1


MEASURE = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from transformers import BertConfig, BertModel
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.backbone import ATTENTION
from peft import LoraConfig, get_peft_model
from tests.tiny import random_episode, tiny_config

torch.set_num_threads(1)
steps = int(sys.argv[1])
config = BertConfig(vocab_size=20, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)
config._attn_implementation = ATTENTION
lora = LoraConfig(r=8, target_modules=["query", "value"])
module = get_peft_model(BertModel(config).eval().requires_grad_(False), lora)
settings = tiny_config("none", learner="maml", inner_steps=steps, inner_learning_rate=0.01, graph_memory_gb=0.0)
learner = build_learner(settings, FewShotModel(module.eval(), None, settings))
params, episode = learner.init_params(), random_episode([12] * 5, n_query=12)
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
learner.meta_grad(params, [random_episode([1, 1])])
idle = peak()
learner.meta_grad(params, [episode])
print(peak() - idle)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_steps():
    """Peak memory above the idle model, each number of steps in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_ARENA_MAX": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"}
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", MEASURE, steps], env=environment, capture_output=True, check=True
            ).stdout
        )
        for steps in ("1", "50")
    ]
    assert peaks[0] > 10_000, "the step is too small to measure"
    assert peaks[1] <= 1.1 * peaks[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inner_steps": 5}, "exact, all 5 inner steps in one graph"),
        ({"inner_steps": 5, "graph_memory_gb": 0.0}, "exact, graphs of 1 of 5 inner steps in memory at a time"),
        ({"inner_steps": 5, "estimator": "first_order", "graph_memory_gb": 0.0}, "first order"),
        ({"inner_steps": 1, "graph_memory_gb": 0.0}, "exact"),
        ({"learner": "reptile", "inner_steps": 5}, "reptile"),
    ],
)
def test_it_says_what_it_does(bert_folder, settings, words):
    learner = build_learner(tiny_config(bert_folder, **{"learner": "maml", **settings}))
    assert learner.describe(random_episode(COUNTS).support).startswith(words)


def test_the_trunk_below_an_adapter_changes_no_gradient(bert_folder, monkeypatch):
    def grads():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["query", "value"], layers_to_transform=[1], init_lora_weights=False)
        settings = tiny_config(bert_folder, learner="maml", inner_steps=3, inner_learning_rate=0.1)
        learner = build_learner(settings, FewShotModel.build(settings, config))
        learner.model.module.double()
        params = {name: value.double() for name, value in learner.init_params().items()}
        runs.clear()
        count = lambda layer, args, output: runs.append(len(args[0]))  # noqa: E731
        learner.model.module.base_model.model.encoder.layer[0].register_forward_hook(count)
        return learner.meta_grad(params, [random_episode(COUNTS)]).grads

    # A row for each text, to be counted.
    monkeypatch.setattr("fewshot_nlp.models.model.packing_for", lambda inputs: None)
    runs: list[int] = []
    found = grads()
    once = sum(runs)
    monkeypatch.setattr("fewshot_nlp.models.model.find_trunk", lambda *_, **__: None)
    assert_equal(found, grads())
    # Every text goes through it once, in groups that are filled up, with one more on which memory is counted; without
    # it, the support set in each of three steps, and a batch of eight to count on in two steps.
    support, query = sum(COUNTS), 2 * len(COUNTS)
    assert once <= sum(-(-texts // ROWS) * ROWS for texts in (support, query, 1))
    assert sum(runs) == 3 * support + query + 2 * 8


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_the_multi_step_loss_is_the_weighted_sum_over_the_steps(bert_folder, chunk):
    weights = [0.5, 0.0, 0.25, 1.0]
    episode = random_episode(COUNTS)
    learner, params = learner_and_params(bert_folder, learner="maml", inner_steps=4, step_loss_weights=weights)
    learner.chunk = chunk
    found = learner.meta_grad(params, [episode])
    expected = {name: torch.zeros_like(value) for name, value in params.items()}
    for steps, weight in enumerate(weights, start=1):
        shorter, _ = learner_and_params(bert_folder, learner="maml", inner_steps=steps)
        for name, grad in unrolled(shorter, params, [episode]).items():
            expected[name] += weight * grad
    assert_equal(found.grads, expected)
    single, _ = learner_and_params(bert_folder, learner="maml", inner_steps=4)
    assert torch.equal(found.loss, single.meta_grad(params, [episode]).loss), "what is reported is the last step's"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": 3, "step_loss_weights": [1.0, 1.0]}, "2 weights, and there are 3 inner steps"),
        ({"inner_steps": 1, "step_loss_weights": [1.0], "learner": "reptile"}, "looks at the end .* Use estimator"),
        ({"step_loss_weights": [0.0]}, "not all of them 0"),
        ({"step_loss_weights": [-1.0]}, "step_loss_weights=-1.0"),
        ({"step_loss_weights": 1.0}, "must be a list, such as"),
        ({"step_loss_weights": [1.0], "learner": "protonet", "head": "prototype"}, "'protonet' has none"),
    ],
)
def test_step_loss_weights_that_do_not_fit(bert_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        build_learner(tiny_config(bert_folder, **{"learner": "maml", **settings}))


offline = [
    pytest.mark.offline,
    pytest.mark.skipif(packaged_backbone(DEFAULT_BACKBONE) is None, reason="needs the offline extra"),
]


class TestMiniLM:
    pytestmark = offline

    @pytest.mark.parametrize(("adapter", "steps"), [("lora", 5), ("lora", 20), ("prompt_tuning", 5)])
    def test_step_by_step_is_exact(self, adapter, steps):
        config = FewShotConfig(learner="maml", adapter=adapter, inner_steps=steps, inner_learning_rate=0.05)
        learner = build_learner(config)
        learner.model.module.double()
        params = {name: value.double() for name, value in learner.init_params().items()}
        episode = example_episode(learner, 2, 1, 1, [4, 6])
        expected = unrolled(learner, params, [episode])
        learner.chunk = 1
        assert_equal(learner.meta_grad(params, [episode]).grads, expected)

    @pytest.mark.parametrize("layers", [None, [4, 5]])
    def test_frozen_matrices_in_bfloat16_change_the_gradient_by_hundredths(self, layers):
        def grads(**settings):
            config = FewShotConfig(learner="maml", adapter="lora", inner_steps=3, inner_learning_rate=0.05, **settings)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                lora = LoraConfig(
                    r=4, target_modules=["query", "value"], layers_to_transform=layers, init_lora_weights=False
                )
                learner = build_learner(config, FewShotModel.build(config, lora))
            found = learner.meta_grad(learner.init_params(), [example_episode(learner, 3, 2, 2, [7, 9])]).grads
            return torch.cat([found[name].flatten() for name in sorted(found) if name.startswith("model.")])

        exact, half = grads(), grads(frozen_dtype="bfloat16")
        assert 1e-6 < (half - exact).norm() / exact.norm() < 5e-2
        assert abs(half.norm() / exact.norm() - 1) < 5e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learner": "anil", "estimator": "reptile"}, "trains nothing with learner='anil'"),
        ({"learner": "maml", "estimator": "reptile", "inner_rule": "meta_sgd"}, "cannot train the rates of"),
        ({"learner": "reptile", "inner_rule": "step_rates"}, "cannot train the rates of"),
        ({"adapter": "full", "frozen_dtype": "bfloat16"}, "no matrix is frozen"),
        ({"frozen_dtype": "float16"}, "frozen_dtype='float16'"),
    ],
)
def test_settings_that_would_train_nothing_or_change_nothing(bert_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        build_learner(tiny_config(bert_folder, **settings))


def test_gradient_checkpointing_in_the_backbone_changes_no_gradient(bert_folder):
    learner, params = learner_and_params(bert_folder, learner="maml", inner_steps=3)
    module = learner.model.module
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    episodes, runs = [random_episode(COUNTS)], []
    layer = module.get_base_model().encoder.layer[0]
    layer.attention.register_forward_hook(lambda *_: runs.append(1))
    module.train()
    for chunk in (None, 1):
        learner.chunk = chunk
        expected = learner.meta_grad(params, episodes).grads
        plain = len(runs)
        with warnings.catch_warnings():
            # transformers is renaming it.
            warnings.simplefilter("ignore", FutureWarning)
            module.get_base_model().gradient_checkpointing_enable()
            found = learner.meta_grad(params, episodes).grads
            module.get_base_model().gradient_checkpointing_disable()
        assert_equal(found, expected)
        assert len(runs) > 2 * plain, "layers were run again"
        runs.clear()


@pytest.mark.parametrize("layers", [[0, 1], [1]])
def test_dropout_of_a_part_is_dropout(bert_folder, layers):
    """The backbone in training mode, and the adapter around it not: each step draws anew, in all layers."""
    settings = {"lora_layers_to_transform": layers, "head_init": "zero", "inner_steps": 3}
    found = []
    for whole in (True, False):
        learner, params = learner_and_params(bert_folder, **settings)
        module = learner.model.module
        (module if whole else module.get_base_model()).train()
        # What was drawn for one episode is not kept for the next.
        learner.meta_grad(params, [random_episode(COUNTS, seed=1)])
        found.append(learner.meta_grad(params, [random_episode(COUNTS)]).grads)
    assert_equal(*found)


# transformers is renaming it.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_prefix_is_refused_where_checkpointing_would_leave_it_out(bert_folder):
    learner, params = learner_and_params(bert_folder, adapter="prefix_tuning", num_virtual_tokens=2)
    episodes = [random_episode(COUNTS)]
    expected = learner.meta_grad(params, episodes).grads
    bare = learner.model.module.get_base_model()
    bare.gradient_checkpointing_enable()
    assert_equal(learner.meta_grad(params, episodes).grads, expected)
    bare.train()
    with pytest.raises(ValueError, match=r"passes over the keys and values .* Turn it off, or use adapter='prompt_tun"):
        learner.meta_grad(params, episodes)


def test_texts_go_through_the_trunk_once(bert_folder):
    """Over steps, episodes and evaluations; what is answered is what a model without a trunk answers."""
    config = LoraConfig(r=2, target_modules=["query", "value"], layers_to_transform=[1])
    settings = tiny_config(bert_folder, learner="maml", inner_steps=2)
    learner, whole = (build_learner(settings, FewShotModel.build(settings, config)) for _ in range(2))
    whole.model.trunk = None
    params, episode = learner.init_params(), random_episode(COUNTS)
    seen = []
    run = learner.model.trunk._run
    learner.model.trunk._run = lambda inputs: seen.append(1) or run(inputs)
    found, expected = (each.meta_grad(params, [episode]) for each in (learner, whole))
    texts = len(episode.support) + len(episode.query)
    # And the text on which the memory of a step is counted.
    assert len(seen) <= texts + 1
    for name, grad in expected.grads.items():
        torch.testing.assert_close(found.grads[name], grad, rtol=1e-4, atol=1e-6)
    before = len(seen)
    learner.predict(params, learner.adapt(params, episode.support), episode.query)
    again = learner.meta_grad(params, [episode])
    assert len(seen) == before
    assert all(torch.equal(again.grads[name], grad) for name, grad in found.grads.items())


def test_where_exactness_is_impossible_it_is_said(bert_folder):
    def learner_with(attention, **settings):
        config = tiny_config(bert_folder, learner="maml", **settings)
        module = AutoModel.from_pretrained(bert_folder, attn_implementation=attention).eval().requires_grad_(False)
        with warnings.catch_warnings():
            # PEFT's own, about what it asks of transformers.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(module, LoraConfig(r=2, target_modules=["query", "value"])).eval()
        return build_learner(config, FewShotModel(adapted, None, config))

    episodes = [random_episode(COUNTS)]
    fused = learner_with("sdpa")
    params = {n: v + 0.1 if "lora_B" in n else v for n, v in fused.init_params().items()}
    with pytest.raises(
        NotImplementedError, match=r"impossible: .*derivative for .* Load the .*estimator='first_order'"
    ):
        fused.meta_grad(params, episodes)
    # One derivative there is.
    found, expected = (
        learner_with(attention, estimator="first_order").meta_grad(params, episodes).grads
        for attention in ("sdpa", ATTENTION)
    )
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("head_init", "steps", "back"), [("zero", 1, 0), ("zero", 3, 2), ("prototype", 1, 1)])
def test_the_first_step_from_a_head_of_zeros_does_not_go_back_through_the_backbone(bert_folder, head_init, steps, back):
    learner, params = learner_and_params(bert_folder, head_init=head_init, inner_steps=steps)
    passes: list[int] = []

    def watch(layer, args, output):
        output.register_hook(lambda grad: passes.append(1))

    learner.model.module.base_model.model.encoder.layer[-1].register_forward_hook(watch)
    state = learner.adapt(params, random_episode(COUNTS).support)
    # A pass for each of two buckets of length, at most.
    assert back <= len(passes) <= 2 * back
    moved = [name for name in state if name in params and not torch.equal(state[name], params[name])]
    assert bool(moved) == bool(back) and state["head.weight"].abs().sum() > 0
