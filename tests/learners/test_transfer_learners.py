"""Meta-LSTM, meta-transfer, joint training and domain-adversarial prototypes against their equations, in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy, cross_entropy, normalize

from fewshot_nlp.data import EpisodeReader, EpisodeSampler, TextEncoder
from fewshot_nlp.data.config import EpisodeConfig
from fewshot_nlp.functional.rules import Point
from fewshot_nlp.learners import build_learner
from fewshot_nlp.learners.domain_adversarial import DomainAdversarialOptions, reverse
from fewshot_nlp.learners.meta_lstm import preprocess
from fewshot_nlp.training import FewShotTrainer
from fewshot_nlp.types import OUT_OF_SCOPE
from tests.data.toy_data import make_pool
from tests.tiny import random_episode, tiny_config, tiny_tokenizer
from tests.training.toy import toy_args

COUNTS = [1, 3, 2]


def made(folder, learner, seed=1, **settings):
    """A learner in float64, and parameters away from its start."""
    found = build_learner(tiny_config(folder, learner=learner, **{"inner_learning_rate": 0.1, **settings}))
    found.model.module.double()
    rng = torch.Generator().manual_seed(seed)
    return found, {
        name: value.double() + 0.1 * torch.randn(value.shape, generator=rng, dtype=torch.float64)
        for name, value in found.init_params().items()
    }


def pooled(learner, params, batch):
    """Mean of the token states, with nothing of the package but the backbone."""
    body = {name.removeprefix("model."): value for name, value in params.items() if name.startswith("model.")}
    hidden = functional_call(learner.model.module, body, kwargs=batch.inputs).last_hidden_state
    mask = batch.inputs["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


def prototype_loss(learner, params, episode):
    features, asked = pooled(learner, params, episode.support), pooled(learner, params, episode.query)
    means = torch.stack([features[episode.support.labels == c].mean(0) for c in range(len(COUNTS))])
    logits = params["head.log_scale"].exp() * normalize(asked, dim=1) @ normalize(means, dim=1).T
    return cross_entropy(logits, episode.query.labels)


def gradient(loss, params):
    found = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return dict(zip(params, found, strict=True))


def leaves(params):
    return {name: value.clone().requires_grad_() for name, value in params.items()}


def assert_all_close(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n} {m}")


# Meta-LSTM


def test_preprocessing_is_the_appendix():
    x = torch.tensor([1.0, -math.exp(-5), math.exp(4), 1e-6, -1e-6, 0.0], dtype=torch.float64)
    tiny = math.exp(10) * 1e-6
    expected = torch.tensor([[0.0, 1], [-0.5, -1], [0.4, 1], [-1, tiny], [-1, -tiny], [-1, 0]], dtype=torch.float64)
    torch.testing.assert_close(preprocess(x), expected)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(preprocess(x).sum(), x)
    assert slope.isfinite().all()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def seen(x):
    return (math.log(abs(x)) / 10, math.copysign(1, x)) if abs(x) >= math.exp(-10) else (-1.0, math.exp(10) * x)


@pytest.mark.parametrize("hidden", [0, 3])
def test_the_rule_coordinate_by_coordinate(bert_folder, hidden):
    """Two steps of the equations in plain Python, one coordinate at a time."""
    learner, params = made(bert_folder, "meta_lstm", head_learning_rate=0.3, learner_kwargs={"hidden_size": hidden})
    own = {name.removeprefix("learner.gates."): value for name, value in params.items() if "gates" in name}
    rng = torch.Generator().manual_seed(0)
    fast = {"model.a": torch.randn(2, 2, generator=rng).double(), "head.weight": torch.randn(3, generator=rng).double()}
    slots, start = learner.rule.init(fast), {name: value.clone() for name, value in fast.items()}
    grads = [{n: torch.randn(v.shape, generator=rng).double() for n, v in fast.items()} for _ in range(2)]
    grads[0]["model.a"][0, 0] = 1e-6
    losses = [0.7, 0.2]
    for step in range(2):
        point = Point(fast, step, params, torch.tensor(losses[step], dtype=torch.float64))
        updates, slots = learner.rule.update(grads[step], slots, point)
        fast = {name: value + updates[name] for name, value in fast.items()}

    def gate(name, given, more=0.0):
        weight = own[f"{name}.weight"][0].tolist()
        assert len(weight) == len(given)
        return sigmoid(sum(w * x for w, x in zip(weight, given, strict=True)) + float(own[f"{name}.bias"]) + more)

    for name, rate in (("model.a", 0.1), ("head.weight", 0.3)):
        for at in range(start[name].numel()):
            theta, i, f = float(start[name].flatten()[at]), 0.0, 0.0
            h, m = torch.zeros(hidden).double(), torch.zeros(hidden).double()
            for step in range(2):
                g = float(grads[step][name].flatten()[at])
                x = [*seen(g), *seen(losses[step])]
                if hidden:
                    z = own["lower.weight_ih"] @ torch.tensor(x, dtype=torch.float64) + own["lower.bias_ih"]
                    z = z + own["lower.weight_hh"] @ h + own["lower.bias_hh"]
                    into, keep, new, out = z.chunk(4)
                    m = keep.sigmoid() * m + into.sigmoid() * new.tanh()
                    h = out.sigmoid() * m.tanh()
                    x = h.tolist()
                i = gate("input", [*x, theta, i], math.log(rate / (1 - rate)))
                f = gate("forget", [*x, theta, f])
                theta = f * theta - i * g
            assert float(fast[name].flatten()[at]) == pytest.approx(theta, abs=1e-12)


def test_meta_transfer_leaves_what_an_adapter_trains(bert_folder):
    """BitFit's biases are trained beside scales and shifts of the weights, and not overridden by these."""
    learner, params = made(bert_folder, "meta_transfer", adapter="bitfit")
    episode, names = random_episode(COUNTS), [name for name in params if name.endswith("query.bias")]
    assert names and all(learner.meta_grad(params, [episode]).grads[name].abs().max() > 1e-9 for name in names)
    state = learner.adapt(params, episode.support)
    moved = {**params, names[0]: params[names[0]] + 1.0}
    assert (
        learner.predict(moved, state, episode.query) - learner.predict(params, state, episode.query)
    ).abs().max() > 0


@pytest.mark.parametrize("told", ["learn_label_name_weight", "condition_on_names"])
def test_joint_training_reports_what_it_answers_with_names(bert_folder, told):
    learner, params = made(bert_folder, "joint", use_label_names=True, **{told: True})
    episode = random_episode(COUNTS, names=True)
    found = learner.meta_grad(params, [episode])
    torch.testing.assert_close(found.logits[0], answer(learner, params, episode))


def answer(learner, params, episode):
    return learner.predict(params, learner.adapt(params, episode.support), episode.query)


def open_gates(params):
    """Weights of the gates zero, the forget gate one: nothing is left but the step size."""
    return {
        name: torch.full_like(value, 50.0 if name.endswith("forget.bias") else 0.0) if "gates" in name else value
        for name, value in params.items()
    }


def test_with_open_gates_it_is_gradient_descent(bert_folder):
    learner, params = made(bert_folder, "meta_lstm", head_learning_rate=0.3, inner_steps=3)
    plain, _ = made(bert_folder, "fomaml", head_learning_rate=0.3, inner_steps=3)
    given, episode = open_gates(params), random_episode(COUNTS)
    rest = {name: value for name, value in given.items() if "gates" not in name}
    assert_all_close(learner.adapt(given, episode.support), plain.adapt(rest, episode.support))
    found, expected = learner.meta_grad(given, [episode]), plain.meta_grad(rest, [episode])
    assert_all_close({name: found.grads[name] for name in rest}, expected.grads)
    assert found.grads["learner.gates.input.bias"].abs() > 1e-6


def test_the_untrained_rule_is_close_to_gradient_descent(bert_folder):
    learner, _ = made(bert_folder, "meta_lstm")
    plain, _ = made(bert_folder, "fomaml")
    episode, start = random_episode(COUNTS), {n: v.double() for n, v in learner.init_params().items()}
    rest = {name: value for name, value in start.items() if "gates" not in name}

    def answers(each, given):
        return each.predict(given, each.adapt(given, episode.support), episode.query)

    stays = build_learner(replace(plain.config, inner_steps=0), plain.model)
    before, expected = answers(stays, rest), answers(plain, rest)
    assert (answers(learner, start) - expected).norm() < 0.1 * (expected - before).norm()


@pytest.mark.parametrize("estimator", ["first_order", "exact"])
def test_first_order_neglects_what_the_paper_neglects(bert_folder, estimator):
    """Of two steps by hand: gradient and loss are constants, while gates and weights are not."""
    learner, params = made(bert_folder, "meta_lstm", estimator=estimator, head_init="zero")
    episode, theta = random_episode(COUNTS), leaves(params)
    kept = estimator == "exact"

    def loss(fast, batch):
        features = normalize(pooled(learner, fast, batch), dim=1)
        logits = theta["head.log_scale"].exp() * (features @ fast["head.weight"].T + fast["head.bias"])
        return cross_entropy(logits, batch.labels)

    fast = {name: value for name, value in theta.items() if name.startswith("model.")}
    fast |= {"head.weight": torch.zeros(3, 16).double(), "head.bias": torch.zeros(3).double()}
    fast = {name: value if value.requires_grad else value.requires_grad_() for name, value in fast.items()}
    slots = learner.rule.init(fast)
    for step in range(2):
        value = loss(fast, episode.support)
        grads = dict(zip(fast, torch.autograd.grad(value, list(fast.values()), create_graph=True), strict=True))
        if not kept:
            grads, value = {name: grad.detach() for name, grad in grads.items()}, value.detach()
        updates, slots = learner.rule.update(grads, slots, Point(fast, step, theta, value))
        fast = {name: old + updates[name] for name, old in fast.items()}
    assert_all_close(learner.meta_grad(params, [episode]).grads, gradient(loss(fast, episode.query), theta))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "reptile"}, "looks at the end of the inner loop alone.*Use estimator='first_order'"),
        ({"estimator": "implicit", "proximal": 1.0}, "looks at the end of the inner loop alone"),
        ({"inner_learning_rate": 1.0}, "inner step size of 1.0 is out of range.*between 0 and 1"),
        ({"head_learning_rate": 0.0}, "inner step size of 0.0 is out of range"),
        ({"inner_rule": "adam"}, "inner_rule='adam' contradicts learner='meta_lstm'"),
        ({"learner_kwargs": {"hidden_size": -1}}, "hidden_size=-1 is out of range"),
    ],
)
def test_meta_lstm_refuses_what_it_cannot_be(bert_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        build_learner(tiny_config(bert_folder, learner="meta_lstm", **settings))


# Meta-transfer


def modulated(learner, params):
    """A copy of the backbone with weights written over: each row by its own scale, each bias by its own shift."""
    module = copy.deepcopy(learner.model.module)
    scales, shifts = iter(params["learner.modulation.scale"]), iter(params.get("learner.modulation.shift", ()))
    with torch.no_grad():
        layers = [
            layer
            for name, layer in module.named_modules()
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and "pooler" not in name
        ]
        for layer in layers:
            for row in layer.weight:
                row *= next(scales)
            for at in range(0 if layer.bias is None else len(layer.bias)):
                layer.bias[at] += next(shifts)
    assert next(scales, None) is None and next(shifts, None) is None
    return module


@pytest.mark.parametrize("kind", ["text", "image", "vector"])
def test_features_are_those_of_scaled_and_shifted_weights(folders, kind):
    learner, params = made(folders[kind], "meta_transfer", adapter="none")
    assert ("learner.modulation.shift" in params) == (kind != "image")
    episode = random_episode(COUNTS, kind=kind)
    output = modulated(learner, params)(**episode.query.inputs)
    if kind == "text":
        mask = episode.query.inputs["attention_mask"][..., None]
        expected = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    else:
        expected = output.pooler_output
    torch.testing.assert_close(learner.features(params, episode.query.inputs), expected)


def test_untrained_scales_change_nothing(bert_folder):
    learner, _ = made(bert_folder, "meta_transfer", adapter="none")
    plain, _ = made(bert_folder, "anil", adapter="none")
    episode, start = random_episode(COUNTS), learner.init_params()
    head = {name: value for name, value in start.items() if not name.startswith("learner.")}
    assert_all_close(learner.adapt(start, episode.support), plain.adapt(head, episode.support))
    assert {name.split(".")[0] for name in start} == {"learner", "head"}


def test_gradients_are_those_of_the_weights_contracted(bert_folder):
    """dQ/dΦ1[o] = Σ_i W[o, i] dQ/dW'[o, i] and dQ/dΦ2 = dQ/db', with ANIL's dQ/dW' on the weights W'."""
    learner, params = made(bert_folder, "meta_transfer", adapter="none", head_learning_rate=0.3)
    full, _ = made(bert_folder, "anil", adapter="full", head_learning_rate=0.3)
    changed = {f"model.{n}": p.detach() for n, p in modulated(learner, params).named_parameters()}
    episode = random_episode(COUNTS)
    grads = full.meta_grad({**changed, "head.log_scale": params["head.log_scale"]}, [episode]).grads
    scale, shift = [], []
    for name, layer in learner.model.module.named_modules():
        if isinstance(layer, torch.nn.Linear) and "pooler" not in name:
            scale.append((layer.weight * grads[f"model.{name}.weight"]).sum(1))
            shift.append(grads[f"model.{name}.bias"])
    found = learner.meta_grad(params, [episode]).grads
    expected = {"learner.modulation.scale": torch.cat(scale), "learner.modulation.shift": torch.cat(shift)}
    assert_all_close({name: found[name] for name in expected}, expected)


def test_layers_by_name_and_beside_lora(bert_folder):
    """Four hundred rows of the tiny BERT's blocks; PEFT's own layers are not among them."""
    rows = {"all": 2 * (16 * 5 + 32), "query": 2 * 16}
    for adapter in ("none", "lora", "prompt_tuning"):
        for kind, named in (("all", None), ("query", ["query"])):
            learner, params = made(
                bert_folder, "meta_transfer", adapter=adapter, learner_kwargs={"target_modules": named}
            )
            assert params["learner.modulation.scale"].shape == (rows[kind],)
            assert learner.meta_grad(params, [random_episode(COUNTS)]).grads.keys() == params.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "full"}, r"there are none with adapter='full'\. Use adapter='none'"),
        ({"adapter": "none", "learner_kwargs": {"target_modules": ["qeury"]}}, r"none called \['qeury'\] with"),
        ({"adapter": "none", "learner_kwargs": {"target_modules": "query"}}, "must be a list of names of layers"),
    ],
)
def test_meta_transfer_needs_frozen_layers(bert_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        build_learner(tiny_config(bert_folder, learner="meta_transfer", **settings))


# Joint training


def test_the_joint_objective_by_hand(bert_folder):
    """Two source tasks and one of the target, which weighs λ."""
    learner, params = made(bert_folder, "joint", learner_kwargs={"target": "german", "weight": 0.3}, head="prototype")
    episodes = [random_episode(COUNTS, seed=seed) for seed in range(3)]
    episodes[1] = replace(episodes[1], spec=replace(episodes[1].spec, pool="german"))
    theta = leaves(params)
    losses = [prototype_loss(learner, theta, episode) for episode in episodes]
    expected = gradient(losses[0] + 0.3 * losses[1] + losses[2], theta)
    assert_all_close(learner.meta_grad(params, episodes).grads, expected)


def test_joint_adapts_by_the_inner_loop(bert_folder):
    learner, params = made(bert_folder, "joint", inner_steps=3)
    maml, _ = made(bert_folder, "maml", inner_steps=3)
    support = random_episode(COUNTS).support
    assert_all_close(learner.adapt(params, support), maml.adapt(params, support))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_rule": "meta_sgd"}, "cannot learn the rates of inner_rule='meta_sgd'"),
        ({"head_init": "zero"}, "head_init='zero' contradicts learner='joint'"),
        ({"learner_kwargs": {"target": 3}}, "target=3 must be the name of a data set"),
        ({"learner_kwargs": {"weight": -1.0}}, "weight=-1.0 is out of range"),
    ],
)
def test_joint_refuses_what_it_cannot_train(bert_folder, settings, message):
    # The linear head's own default is to start at the prototypes.
    with pytest.raises(ValueError, match=message):
        build_learner(tiny_config(bert_folder, learner="joint", **settings))


# Domain-adversarial training


def test_reversal_keeps_the_numbers_and_turns_the_gradient():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y = reverse(x, 0.3)
    assert torch.equal(y, x)
    torch.testing.assert_close(torch.autograd.grad((y**2).sum(), x)[0], -0.3 * 2 * x)


def test_the_saddle_point_by_hand(bert_folder):
    """Down the task's loss and up the discriminator's for the features; down the discriminator's for itself."""
    learner, params = made(bert_folder, "domain_adversarial", head="prototype", learner_kwargs={"weight": 0.3})
    episode, theta = random_episode(COUNTS), leaves(params)
    task = gradient(prototype_loss(learner, theta, episode), theta)

    def probability(batch):
        w0, b0, w2, b2 = (
            theta[f"learner.discriminator.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        return torch.sigmoid(torch.clamp(pooled(learner, theta, batch) @ w0.T + b0, min=0) @ w2.T + b2)[:, 0]

    source = torch.cat([probability(episode.support), probability(episode.query)])
    target = probability(episode.unlabelled)
    domain = (
        binary_cross_entropy(source, torch.zeros_like(source)) + binary_cross_entropy(target, torch.ones_like(target))
    ) / 2
    apart = gradient(domain, theta)
    expected = {name: apart[name] if name.startswith("learner.") else task[name] - 0.3 * apart[name] for name in params}
    assert sum(apart[name].abs().sum() for name in params if name.startswith("model.")) > 1e-3
    found = learner.meta_grad(params, [episode])
    assert_all_close(found.grads, expected)
    torch.testing.assert_close(found.loss, prototype_loss(learner, theta, episode).detach())


def test_the_weight_rises_as_the_paper_has_it():
    options = DomainAdversarialOptions(weight=0.4, ramp_episodes=200)
    assert options.at(0) == 0
    assert options.at(20) == pytest.approx(0.4 * math.tanh(0.5))
    assert options.at(200) == options.at(10_000) == pytest.approx(0.4 * math.tanh(5))
    assert DomainAdversarialOptions(weight=0.4).at(0) == 0.4


def test_it_answers_as_a_prototypical_network(bert_folder):
    learner, params = made(bert_folder, "domain_adversarial", head="prototype")
    plain, _ = made(bert_folder, "protonet", head="prototype")
    rest, episode = {n: v for n, v in params.items() if not n.startswith("learner.")}, random_episode(COUNTS)
    found, expected = (
        each.predict(given, each.adapt(given, episode.support), episode.query)
        for each, given in ((learner, params), (plain, rest))
    )
    assert torch.equal(found, expected)


def test_without_unlabelled_inputs_it_cannot_be_trained(bert_folder):
    learner, params = made(bert_folder, "domain_adversarial")
    with pytest.raises(ValueError, match=r"random/train/0 has no unlabelled inputs.*Set n_unlabelled"):
        learner.meta_grad(params, [replace(random_episode(COUNTS), unlabelled=None)])


def readers():
    """A training pool, a pool of another domain, and a reader of both."""
    sizes = dict.fromkeys(["play", "stop", "lamp"], 8)
    source, target = make_pool(sizes, name="source"), make_pool(sizes, name="target")
    return source, target, TextEncoder(tiny_tokenizer(), max_length=16)


def test_unlabelled_texts_follow_from_the_address():
    source, target, encoder = readers()
    sampler = EpisodeSampler(source, n_way=2, k_shot=1, n_query=1)
    drawn, encode = [], encoder.encode
    encoder.encode = lambda texts: drawn.append(texts) or encode(texts)

    def read(spec, pool=source, **options):
        drawn.clear()
        episode = EpisodeReader(pool, encoder, **options)(spec)
        return episode.unlabelled, drawn[2:]

    given = {"unlabelled": target, "n_unlabelled": 4}
    batch, (texts,) = read(sampler[0], **given)
    assert batch.labels.tolist() == [OUT_OF_SCOPE] * 4
    assert torch.equal(batch.inputs["input_ids"], encoder(texts)["input_ids"])
    assert len(set(texts)) == 4 and set(texts) <= {t for r in target.rows_by_class.values() for t in target.texts(r)}
    assert read(sampler[0], **given)[1] == [texts]
    assert read(sampler[1], **given)[1] != [texts]
    assert read(sampler[0]) == (None, [])
    held_out = replace(source, split="test")
    assert read(EpisodeSampler(held_out, n_way=2, k_shot=1, n_query=1)[0], held_out, **given) == (None, [])


def test_too_few_unlabelled_texts_are_an_error():
    source, target, encoder = readers()
    with pytest.raises(ValueError, match=r"n_unlabelled=9999 texts are more than the \d+ given"):
        EpisodeReader(source, encoder, unlabelled=target, n_unlabelled=9999)
    with pytest.raises(ValueError, match="n_unlabelled=3 texts are more than the 0 given"):
        EpisodeReader(source, encoder, n_unlabelled=3)


@pytest.mark.parametrize(
    ("learner", "count", "message"),
    [
        ("domain_adversarial", 0, "n_unlabelled=0, and the learner reads texts without labels. Set it"),
        ("protonet", 4, "n_unlabelled=4, and the learner does not read texts without labels. Leave it out"),
    ],
)
def test_learner_and_reader_must_agree(bert_folder, tmp_path, learner, count, message):
    source, target, encoder = readers()
    reader = EpisodeReader(source, encoder, unlabelled=target, n_unlabelled=count)
    sampler = EpisodeSampler(source, n_way=2, k_shot=1, n_query=1)
    with pytest.raises(ValueError, match=message):
        FewShotTrainer(build_learner(tiny_config(bert_folder, learner=learner)), toy_args(tmp_path), sampler, reader)


def test_the_domain_of_training_is_not_the_one_without_labels():
    with pytest.raises(ValueError, match=r"n_unlabelled=4 takes texts of dataset_name.*mixture_weights with 0 first"):
        EpisodeConfig(n_unlabelled=4)
    with pytest.raises(ValueError, match="mixture_weights with 0 first"):
        EpisodeConfig(n_unlabelled=4, mixture_dataset_names=["a.csv"])
    assert EpisodeConfig(n_unlabelled=4, mixture_dataset_names=["a.csv"], mixture_weights=[0, 1]).n_unlabelled == 4


def test_meta_transfer_says_of_no_layer_that_it_runs_once(bert_folder):
    """Its scales and shifts are in the lowest layers, too."""
    learner, params = made(bert_folder, "meta_transfer", adapter="lora", lora_layers_to_transform=[1])
    assert learner.model.trunk is not None and "lowest" not in learner.describe(random_episode(COUNTS).support)
    learner.stacking = True
    learner.meta_grad(params, [random_episode(COUNTS), random_episode(COUNTS)])
    learner.read_ahead([random_episode(COUNTS)])
    assert not learner.model.trunk.known.bytes
