"""SNAIL, LEO and the hypernetwork against their equations, written out by hand, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import conv1d, cross_entropy, normalize, pad, scaled_dot_product_attention

from fewshot_nlp.learners import build_learner
from fewshot_nlp.learners.snail import _Attention, _Dense
from tests.tiny import HIDDEN, random_batch, random_episode, tiny_config

COUNTS = [1, 3, 2]


def made(folder, noise=0.1, **settings):
    """A learner in float64 and parameters ``noise`` away from its start."""
    learner = build_learner(tiny_config(folder, **{"inner_learning_rate": 0.1, **settings}))
    learner.model.module.double()
    rng = torch.Generator().manual_seed(1)
    return learner, {
        name: value + noise * torch.randn(value.shape, generator=rng, dtype=torch.float64)
        for name, value in learner.init_params().items()
    }


def answer(learner, params, episode):
    return learner.predict(params, learner.adapt(params, episode.support), episode.query).detach()


def unit(learner, params, inputs):
    return normalize(learner.model.features(params, inputs), dim=1)


def recorded(params):
    return {name: value.clone().requires_grad_() for name, value in params.items()}


def gradient(value, params):
    found = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
    return dict(zip(params, found, strict=True))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


# SNAIL


def test_untrained_snail_attends_by_cosine(bert_folder):
    learner, params = made(bert_folder, noise=0, learner="snail")
    episode = random_episode(COUNTS)
    support, query = (unit(learner, params, batch.inputs) for batch in (episode.support, episode.query))
    # Beside the examples there is nothing to attend to, at a score of zero.
    weights = pad(4 * query @ support.T, (1, 0)).softmax(dim=1)[:, 1:]
    expected = [4 * weights[:, episode.support.labels == c].sum(dim=1) for c in range(3)]
    torch.testing.assert_close(answer(learner, params, episode), torch.stack(expected, dim=1))


def test_snail_convolves_as_torch_does():
    torch.manual_seed(0)
    block, past, last = _Dense(5, 3, dilation=2).double(), torch.randn(2, 7, 5).double(), torch.randn(2, 1, 5).double()
    sequence = torch.cat([past, last], dim=1)
    kernel = block.convolution.weight.unflatten(1, (2, 5)).transpose(1, 2)
    both = conv1d(pad(sequence.mT, (2, 0)), kernel, block.convolution.bias, dilation=2).mT
    expected = torch.cat([sequence, both[..., :3].tanh() * both[..., 3:].sigmoid()], dim=2)
    torch.testing.assert_close(torch.cat(block(past, last), dim=1), expected)


def test_snail_attends_as_torch_does():
    torch.manual_seed(0)
    block, past, last = _Attention(5, 4, 3).double(), torch.randn(2, 7, 5).double(), torch.randn(2, 1, 5).double()
    sequence = torch.cat([past, last], dim=1)
    key, value = (pad(each(sequence), (0, 0, 1, 0)) for each in (block.key, block.value))
    before = torch.ones(8, 9, dtype=torch.bool).tril()
    read = scaled_dot_product_attention(block.query(sequence), key, value, attn_mask=before)
    torch.testing.assert_close(torch.cat(block(past, last), dim=1), torch.cat([sequence, read], dim=2))


@pytest.mark.parametrize("examples", [1, 3, 9])
def test_snail_answers_at_the_end_of_one_sequence(bert_folder, examples):
    """Queries that share their support set's positions are answered as each at the end of a sequence of its own."""
    options = {"key_size": 4, "value_size": 3, "filters": 3, "sequence_length": 5}
    learner, params = made(bert_folder, learner="snail", learner_kwargs=options)
    network = learner.networks.modules["network"].double()
    rng = torch.Generator().manual_seed(0)
    past, last = (torch.randn(2, n, HIDDEN + 2, generator=rng, dtype=torch.float64) for n in (examples, 4))
    found = learner.networks("network", params, past, last)
    own = {name.removeprefix("learner.network."): value for name, value in params.items()}
    network.load_state_dict({name: own[name] for name in network.state_dict()})
    for i in range(4):
        sequence = torch.cat([past, last[:, i : i + 1]], dim=1)
        for block in network.blocks:
            sequence, _ = block(sequence, sequence[:, -1:])
        torch.testing.assert_close(network.answer(sequence[:, -1])[:, 0], found[:, i])


@pytest.mark.parametrize(("length", "dilations"), [(2, [1]), (8, [1, 2, 4]), (9, [1, 2, 4, 8]), (26, [1, 2, 4, 8, 16])])
def test_snail_convolutions_reach_the_sequence(bert_folder, length, dilations):
    learner, _ = made(bert_folder, learner="snail", learner_kwargs={"sequence_length": length})
    blocks = learner.networks.modules["network"].blocks
    assert [block.dilation for block in blocks if isinstance(block, _Dense)] == 2 * dilations
    assert sum(dilations) + 1 >= length


def test_snail_reads_the_order(bert_folder):
    learner, params = made(bert_folder, learner="snail")
    episode = random_episode(COUNTS)
    support = episode.support
    back = {name: value.flip(0) for name, value in support.inputs.items()}
    other = replace(episode, support=replace(support, inputs=back, labels=support.labels.flip(0)))
    assert (answer(learner, params, episode) - answer(learner, params, other)).abs().max() > 1e-3


# LEO


def leo(folder, **options):
    return made(folder, learner="leo", inner_steps=3, learner_kwargs={"latent_size": 5, "tuning_steps": 1, **options})


def codes(learner, theta, support):
    """Mean and log deviation of each class's code, pair by pair."""
    encoded = unit(learner, theta, support.inputs) @ theta["learner.encoder.weight"].T

    def relation(pair):
        first, second, third = (theta[f"learner.relation.{i}.weight"] for i in (0, 2, 4))
        return third @ (second @ (first @ pair).relu()).relu()

    means, deviations = [], []
    for c in range(support.n_way):
        own = [i for i, label in enumerate(support.labels) if label == c]
        pairs = [relation(torch.cat([encoded[i], other])) for i in own for other in encoded]
        both = torch.stack(pairs).mean(dim=0)
        means.append(encoded[own].mean(dim=0) + both[:5])
        deviations.append(both[5:] - 3)
    return torch.stack(means), torch.stack(deviations)


def leo_loss(learner, theta, episode, noise, kl_weight, encoder_weight):
    """Two steps of the codes, one of the weights; Rusu et al. 2019, algorithm 1."""
    support, query, decoder = episode.support, episode.query, theta["learner.decoder.weight"]

    def loss(weight, batch):
        logits = unit(learner, theta, batch.inputs) @ weight.T
        return cross_entropy(theta["head.log_scale"].exp() * logits, batch.labels)

    mean, log_deviation = codes(learner, theta, support)
    first = code = mean + log_deviation.exp() * noise
    for _ in range(2):
        (slope,) = torch.autograd.grad(loss(code @ decoder.T, support), code, create_graph=True)
        code = code - theta["rule.rate.head.code"] * slope
    weight = code @ decoder.T
    (slope,) = torch.autograd.grad(loss(weight, support), weight, create_graph=True)
    weight = weight - theta["rule.rate.head.weight"] * slope
    divergence = kl_divergence(Normal(mean, log_deviation.exp()), Normal(0.0, 1.0)).mean()
    distance = (code.detach() - first).square().mean()
    return loss(weight, query) + kl_weight * divergence + encoder_weight * distance


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(("kl_weight", "encoder_weight"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.7)])
def test_leo_follows_the_paper(bert_folder, sample, kl_weight, encoder_weight):
    learner, params = leo(bert_folder, sample=sample, kl_weight=kl_weight, encoder_weight=encoder_weight)
    episode = random_episode(COUNTS, seed=4)
    noise = torch.zeros(3, 5, dtype=torch.float64)
    if sample:
        noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    theta = recorded(params)
    expected = gradient(leo_loss(learner, theta, episode, noise, kl_weight, encoder_weight), theta)
    assert_equal(learner.meta_grad(params, [episode]).grads, expected)


def test_leo_draws_in_training_alone(bert_folder):
    drawn, params = leo(bert_folder, sample=True)
    mean, _ = leo(bert_folder, sample=False)
    episode, params = random_episode(COUNTS), {**params, "learner.relation.4.weight": torch.ones(10, 10).double() / 5}
    assert torch.equal(answer(drawn, params, episode), answer(mean, params, episode))
    first, again = (drawn.meta_grad(params, [episode]) for _ in range(2))
    assert torch.equal(first.logits[0], again.logits[0])
    elsewhere = replace(episode, spec=replace(episode.spec, index=1))
    for other in (drawn.meta_grad(params, [elsewhere]), mean.meta_grad(params, [episode])):
        assert (first.logits[0] - other.logits[0]).abs().max() > 1e-3


def test_untrained_leo_is_the_class_means(bert_folder):
    """Where codes are as large as features, so that nothing is lost."""
    options = {"latent_size": HIDDEN}
    learner, params = made(bert_folder, noise=0, learner="leo", inner_steps=0, learner_kwargs=options)
    episode = random_episode(COUNTS)
    support, query = (unit(learner, params, batch.inputs) for batch in (episode.support, episode.query))
    means = torch.stack([support[episode.support.labels == c].mean(dim=0) for c in range(3)])
    torch.testing.assert_close(answer(learner, params, episode), 4 * query @ means.T)


def test_leo_moves_codes_then_weights(bert_folder):
    support = random_batch(COUNTS)
    states = []
    for tuning in (0, 1, 3):
        learner, params = leo(bert_folder, tuning_steps=tuning)
        start = codes(learner, params, support)[0]
        states.append((learner.adapt(params, support), start))
    (all_codes, start), (both, _), (all_weights, first) = states
    assert all_codes.keys() == {"head.code"}
    assert (all_codes["head.code"] - start).abs().max() > 1e-4
    assert (both["head.code"] - start).abs().max() > 1e-4 and both["head.weight"].any()
    torch.testing.assert_close(all_weights["head.code"], first)
    assert all_weights["head.weight"].any()


# The hypernetwork


def hyper(folder, **settings):
    return made(folder, learner="hyper", **{"learner_kwargs": {"code_size": 3}, **settings})


def with_names(batch, seed=9):
    return replace(batch, names=random_batch([1] * batch.n_way, seed).inputs)


def written(learner, theta, support):
    """θ + (U e)(V e)ᵀ, tensor by tensor."""
    features = unit(learner, theta, support.inputs)
    means = [features[support.labels == c].mean(dim=0) for c in range(support.n_way)]
    parts = [normalize(sum(means), dim=0), torch.zeros(HIDDEN, dtype=torch.float64)]
    if support.names is not None:
        parts[1] = normalize(unit(learner, theta, support.names).sum(dim=0), dim=0)
    own = {name.removeprefix("learner.writer."): value for name, value in theta.items()}
    code = torch.tanh(own["code.weight"] @ (HIDDEN**0.5 * torch.cat(parts)) + own["code.bias"])
    body = [name for name in theta if name.startswith("model.")]
    return {
        name: theta[name]
        + ((own[f"left.{i}.weight"] @ code)[:, None] * (own[f"right.{i}.weight"] @ code)).view_as(theta[name])
        for i, name in enumerate(body)
    }


@pytest.mark.parametrize("named", [False, True])
def test_hyper_writes_what_the_equation_says(bert_folder, named):
    learner, params = hyper(bert_folder, inner_steps=0)
    support = random_batch(COUNTS)
    known = support
    if named:
        support = with_names(support)
        known = replace(support.with_names_as_examples(1), names=support.names)
    state = learner.adapt(params, support)
    for name, value in written(learner, params, known).items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-11)
        assert (value - params[name]).abs().max() > 1e-3


def test_untrained_hyper_is_maml(bert_folder):
    episode = random_episode(COUNTS)
    learner, params = hyper(bert_folder, noise=0)
    params = {name: value + 0.1 if name.startswith("model.") else value for name, value in params.items()}
    maml, _ = made(bert_folder, learner="maml")
    shared = {name: value for name, value in params.items() if not name.startswith("learner.")}
    torch.testing.assert_close(answer(learner, params, episode), answer(maml, shared, episode))
    found, expected = learner.meta_grad(params, [episode]).grads, maml.meta_grad(shared, [episode]).grads
    assert_equal({name: found[name] for name in shared}, expected)
    assert all(found[name].any() for name in params if name.startswith("learner.writer.left"))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("proximal", [0.0, 0.5])
def test_hyper_is_maml_from_what_it_writes(bert_folder, named, proximal):
    """Adaptation, and the meta-gradient by the chain rule: MAML's at the written start, drawn back to θ."""
    learner, params = hyper(bert_folder, inner_steps=2, proximal=proximal)
    maml, _ = made(bert_folder, learner="maml", inner_steps=2, proximal=proximal)
    episode = random_episode(COUNTS)
    known = episode
    if named:
        support = with_names(episode.support)
        episode = replace(episode, support=support)
        known = replace(episode, support=support.with_names_as_examples(1))
    theta = recorded(params)
    start = written(learner, theta, replace(known.support, names=episode.support.names))
    there = {"head.log_scale": params["head.log_scale"], **{name: value.detach() for name, value in start.items()}}
    torch.testing.assert_close(answer(learner, params, episode), answer(maml, there, known))
    pulls = maml.meta_grad(there, [known]).grads
    expected = gradient(sum((value * pulls[name]).sum() for name, value in start.items()), theta)
    expected["head.log_scale"] += pulls["head.log_scale"]
    assert_equal(learner.meta_grad(params, [episode]).grads, expected)


def test_hyper_reads_names_of_classes_whatever_their_order(bert_folder):
    learner, params = hyper(bert_folder)
    episode = random_episode(COUNTS)
    named, other = (replace(episode, support=with_names(episode.support, seed)) for seed in (8, 9))
    expected = answer(learner, params, named)
    assert (expected - answer(learner, params, other)).abs().max() > 1e-3
    turn = torch.tensor([1, 2, 0])
    names = {name: value[turn.argsort()] for name, value in named.support.names.items()}
    turned = replace(named, support=replace(named.support, labels=turn[named.support.labels], names=names))
    torch.testing.assert_close(answer(learner, params, turned)[:, turn], expected)


def test_hyper_refuses_reptile(bert_folder):
    with pytest.raises(ValueError, match="estimator='reptile' trains no hypernetwork"):
        hyper(bert_folder, estimator="reptile")


@pytest.mark.parametrize(
    ("learner", "options", "words"),
    [
        ("snail", {"filters": 0}, "filters=0"),
        ("snail", {"sequence_length": 1}, "sequence_length=1"),
        ("leo", {"latent_size": 0}, "latent_size=0"),
        ("leo", {"kl_weight": -1.0}, "kl_weight=-1.0"),
        ("leo", {"sample": "yes"}, "sample='yes'"),
        ("hyper", {"code_size": 0}, "code_size=0"),
    ],
)
def test_options_are_checked(bert_folder, learner, options, words):
    with pytest.raises(ValueError, match=words):
        made(bert_folder, learner=learner, learner_kwargs=options)


@pytest.mark.parametrize("name", ["snail", "leo", "hyper"])
def test_networks_start_from_the_seed(bert_folder, name):
    starts = []
    for seed in (0, 0, 1):
        params = build_learner(tiny_config(bert_folder, learner=name), seed=seed).init_params()
        starts.append(torch.cat([value.flatten() for key, value in params.items() if key.startswith("learner.")]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("name", ["snail", "leo", "hyper"])
def test_they_need_classes(folders, name):
    with pytest.raises(ValueError, match=f"learner='{name}' is not defined for task='regression'"):
        build_learner(tiny_config(folders["vector"], learner=name, task="regression"))
