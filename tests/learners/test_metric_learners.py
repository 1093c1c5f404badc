"""Matching, relation and recurrent relational networks against their equations, and at their limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from fewshot_nlp.learners import build_learner, relational
from fewshot_nlp.types import OUT_OF_SCOPE, Batch
from tests.contracts.subject import rows, same
from tests.tiny import HIDDEN, random_episode, tiny_config

FULL = {"learner": "matching", "learner_kwargs": {"full_context": True}}
UNEQUAL = [1, 3, 2]


def build(folder, **settings):
    """A learner in float64, and its parameters away from their start."""
    learner = build_learner(tiny_config(folder, **settings))
    learner.model.module.double()
    rng = torch.Generator().manual_seed(2)
    start = {name: value.double() for name, value in learner.init_params().items()}
    return learner, {n: v + 0.2 * torch.randn(v.shape, generator=rng, dtype=v.dtype) for n, v in start.items()}, start


def answer(learner, params, episode):
    return learner.predict(params, learner.adapt(params, episode.support), episode.query)


def own(params, module):
    """Parameters of one of the learner's modules, by the module's own names."""
    prefix = f"learner.{module}."
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def attention_by_class(params, queries, examples, labels):
    """Equation 1 of matching networks, a query and an example at a time."""
    scale = params["head.log_scale"].exp()
    total = queries.new_zeros(len(queries), int(labels.max()) + 1)
    for row, query in enumerate(queries):
        weights = torch.stack([(scale * cosine_similarity(query, each, dim=0)).exp() for each in examples])
        for weight, label in zip(weights / weights.sum(), labels, strict=True):
            total[row, label] += weight
    return total.log()


def lstm_step(weights, suffix, entry, hidden, cell):
    """One step of an LSTM, gate by gate: input, forget, cell, output."""
    gates = entry @ weights[f"weight_ih{suffix}"].T + weights[f"bias_ih{suffix}"]
    gates = gates + hidden @ weights[f"weight_hh{suffix}"].T + weights[f"bias_hh{suffix}"]
    let_in, keep, new, let_out = gates.chunk(4, dim=-1)
    cell = keep.sigmoid() * cell + let_in.sigmoid() * new.tanh()
    return let_out.sigmoid() * cell.tanh(), cell


def test_matching_sums_attention_by_class(bert_folder):
    learner, params, _ = build(bert_folder, learner="matching")
    episode = random_episode(UNEQUAL)
    queries, examples = (learner.features(params, each.inputs) for each in (episode.query, episode.support))
    same(answer(learner, params, episode), attention_by_class(params, queries, examples, episode.support.labels))


def test_matching_logits_are_log_probabilities_also_where_attention_underflows(bert_folder):
    learner, params, _ = build(bert_folder, learner="matching")
    logits = answer(learner, {**params, "head.log_scale": torch.tensor(9.0).double()}, random_episode(UNEQUAL))
    assert logits.isfinite().all() and logits.min() < -1000
    same(logits.exp().sum(dim=1), torch.ones(len(logits), dtype=logits.dtype))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_with_one_example_a_class_matching_is_the_prototypical_network(bert_folder, distance):
    learner, params, _ = build(bert_folder, learner="matching", distance=distance)
    prototypes = build_learner(tiny_config(bert_folder, learner="protonet", head="prototype", distance=distance))
    prototypes.model.module.double()
    episode = random_episode([1, 1, 1])
    same(answer(learner, params, episode), answer(prototypes, params, episode).log_softmax(dim=1))


def test_full_context_is_the_papers_recurrence(bert_folder):
    learner, params, _ = build(bert_folder, **FULL)
    episode = random_episode(UNEQUAL)
    queries, examples = (learner.features(params, each.inputs) for each in (episode.query, episode.support))
    zero = examples.new_zeros(HIDDEN)

    weights, context = own(params, "support.lstm"), examples.clone()
    for suffix, order in (("_l0", range(len(examples))), ("_l0_reverse", reversed(range(len(examples))))):
        hidden, cell = zero, zero
        for i in order:
            hidden, cell = lstm_step(weights, suffix, examples[i], hidden, cell)
            context[i] += hidden

    weights, read = own(params, "query.cell"), []
    for query in queries:
        hidden, cell = query, zero
        for _ in range(3):
            r = (context @ hidden).softmax(dim=0) @ context
            out, cell = lstm_step(weights, "", torch.cat([query, r]), hidden, cell)
            hidden = out + query
        read.append(hidden)
    expected = attention_by_class(params, torch.stack(read), context, episode.support.labels)
    same(answer(learner, params, episode), expected)


def test_full_context_sees_the_order_of_the_support_set(bert_folder):
    learner, params, _ = build(bert_folder, **FULL)
    episode = random_episode(UNEQUAL)
    turned = learner.adapt(params, rows(episode.support, list(range(sum(UNEQUAL)))[::-1]))
    found = learner.predict(params, turned, episode.query)
    assert (found - answer(learner, params, episode)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "like"),
    [
        (FULL, "matching"),
        ({"learner": "relation"}, "protonet"),
        ({"learner": "relational"}, "protonet"),
        ({"learner": "relation", "distance": "euclidean"}, "protonet"),
    ],
    ids=["full context", "relation", "relational", "relation, euclidean"],
)
def test_untrained_it_answers_as_the_plain_method_and_can_leave_it(bert_folder, settings, like):
    learner, _, start = build(bert_folder, **settings)
    distance = settings.get("distance", "cosine")
    plain, _, plain_start = build(bert_folder, learner=like, head="prototype", distance=distance)
    episode = random_episode(UNEQUAL)
    same(answer(learner, start, episode), answer(plain, plain_start, episode))
    grads = learner.meta_grad(start, [episode]).grads
    assert any(grad.abs().max() > 1e-6 for name, grad in grads.items() if name.startswith("learner."))


def relation_scores(params, centres, queries):
    """The perceptron of a relation network on one pair at a time, without its last bias."""
    weights = own(params, "relation")
    scores = queries.new_zeros(len(queries), len(centres))
    for i, q in enumerate(queries / queries.square().mean(dim=1, keepdim=True).sqrt()):
        for j, c in enumerate(centres / centres.square().mean(dim=1, keepdim=True).sqrt()):
            hidden = weights["compare.weight"] @ torch.cat([c, q, (c - q).abs(), c * q]) + weights["compare.bias"]
            scores[i, j] = weights["score.weight"][0] @ hidden.clamp(min=0)
    return scores, weights.get("score.bias", 0.0)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_relation_scores_each_pair_and_trains_its_loss(bert_folder, residual, loss):
    learner, params, _ = build(bert_folder, learner="relation", learner_kwargs={"residual": residual, "loss": loss})
    episode = random_episode(UNEQUAL)
    queries, examples = (learner.features(params, each.inputs) for each in (episode.query, episode.support))
    centres = torch.stack([examples[episode.support.labels == c].mean(dim=0) for c in range(3)])
    scores, bias = relation_scores(params, centres, queries)
    likeness = cosine_similarity(queries[:, None], centres[None], dim=-1) if residual else 0.0
    logits = params["head.log_scale"].exp() * (scores + bias + likeness)
    same(answer(learner, params, episode), logits)

    labels = episode.query.labels
    if loss == "mse":
        wrong = [(logits[i, j].sigmoid() - float(labels[i] == j)) ** 2 for i in range(6) for j in range(3)]
        expected = torch.stack(wrong).sum() / 6
    else:
        expected = cross_entropy(logits, labels)
    same(learner.meta_grad(params, [episode]).loss, expected)


def test_squared_error_leaves_out_queries_of_other_classes(bert_folder):
    learner, _, _ = build(bert_folder, learner="relation", learner_kwargs={"loss": "mse"})
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, OUT_OF_SCOPE, 1])
    same(learner.loss(logits, labels), learner.loss(logits[[0, 1, 3]], labels[[0, 1, 3]]))


def test_under_squared_error_an_untrained_relation_is_undecided_halfway(bert_folder):
    """Likeness 0.5 is probability 0.5: neither all yes nor all no, where a sigmoid has no slope."""
    learner, _, start = build(bert_folder, learner="relation", learner_kwargs={"loss": "mse"})
    episode = random_episode([1, 1])
    queries, examples = (learner.features(start, each.inputs) for each in (episode.query, episode.support))
    likeness = cosine_similarity(queries[:, None], examples[None], dim=-1)
    same(answer(learner, start, episode).sigmoid(), (4.0 * (likeness - 0.5)).sigmoid())


def relational_scores(params, examples, labels, query, n_way):
    """Message passing for one query, an edge at a time, each message through the whole of its network."""
    weights = own(params, "graph")

    def silu(x):
        return x / (1 + (-x).exp())

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0.0)

    features = torch.cat([examples, query[None]])
    last = len(examples)
    x = [silu(linear("node", f / f.square().mean().sqrt())) for f in features]
    hidden, cell = x, [torch.zeros_like(each) for each in x]

    def kind(i, j):
        if i == j:
            return "same"
        if last in (i, j):
            return "from query" if j == last else "to query"
        return "same" if labels[i] == labels[j] else "other"

    kinds = ["same", "other", "from query", "to query"]
    for _ in range(3):
        messages = []
        for i in range(last + 1):
            total = torch.zeros_like(x[0])
            for k, name in enumerate(kinds):
                sent = [
                    weights["message.weight"]
                    @ silu(linear("receiver", hidden[i]) + linear("sender", hidden[j]) + weights["kind.weight"][k])
                    for j in range(last + 1)
                    if kind(i, j) == name
                ]
                total = total + (torch.stack(sent).mean(dim=0) if sent else 0.0)
            messages.append(total + weights["message.bias"])
        update = own(params, "graph.update")
        entries = [torch.cat(each) for each in zip(x, messages, strict=True)]
        after = [lstm_step(update, "", *each) for each in zip(entries, hidden, cell, strict=True)]
        hidden, cell = [h for h, _ in after], [c for _, c in after]
    hidden = [h / h.square().mean().sqrt() for h in hidden]
    scores = [
        linear("score", silu(linear("compare", torch.cat([h, hidden[last], h * hidden[last]]))))[0]
        for h in hidden[:last]
    ]
    return torch.stack(
        [torch.stack([s for s, y in zip(scores, labels, strict=True) if y == c]).mean() for c in range(n_way)]
    )


def test_relational_passes_messages_along_every_edge(bert_folder):
    learner, params, _ = build(bert_folder, learner="relational", learner_kwargs={"width": 5})
    episode = random_episode(UNEQUAL)
    queries, examples = (learner.features(params, each.inputs) for each in (episode.query, episode.support))
    labels = episode.support.labels
    centres = torch.stack([examples[labels == c].mean(dim=0) for c in range(3)])
    scores = torch.stack([relational_scores(params, examples, labels, query, 3) for query in queries])
    likeness = cosine_similarity(queries[:, None], centres[None], dim=-1)
    same(answer(learner, params, episode), params["head.log_scale"].exp() * (likeness + scores))


def test_relational_answers_alike_in_parts(bert_folder, monkeypatch):
    learner, params, _ = build(bert_folder, learner="relational")
    episode = random_episode(UNEQUAL)
    expected = answer(learner, params, episode)
    monkeypatch.setattr(relational, "EDGES_AT_ONCE", 100)  # Two graphs of 49 edges at a time.
    same(answer(learner, params, episode), expected)


@pytest.mark.parametrize(
    ("learner", "kwargs", "message"),
    [
        ("matching", {"full_context": "yes"}, "full_context='yes' must be true or false"),
        ("matching", {"processing_steps": 0}, "processing_steps=0 is out of range"),
        ("relation", {"loss": "hinge"}, "loss='hinge' is not known. Use one of: cross_entropy, mse"),
        ("relation", {"residual": 1}, "residual=1 must be true or false"),
        ("relational", {"steps": 0}, "steps=0 is out of range"),
        ("relational", {"step": 2}, "unknown key 'step'. Did you mean 'steps'?"),
    ],
)
def test_wrong_options_are_refused(bert_folder, learner, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_learner(tiny_config(bert_folder, learner=learner, learner_kwargs=kwargs))


def sign_task(seed):
    """Two classes that differ in the sign of the first number alone, beside larger ones that tell nothing."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1]).repeat(7)
    values = 2 * torch.randn(len(labels), HIDDEN, generator=rng)
    values[:, 0] = (1.0 - 2.0 * labels) * torch.tensor([1, -1])[seed % 2]
    whole = Batch({"values": values}, labels, 2)
    return replace(random_episode([1, 1]), support=rows(whole, list(range(4))), query=rows(whole, list(range(4, 14))))


@pytest.mark.parametrize("name", ["relation", "relational"])
def test_it_learns_a_comparison_that_cosines_do_not_make(bert_folder, monkeypatch, name):
    learner = build_learner(tiny_config(bert_folder, learner=name, adapter="none"))
    monkeypatch.setattr(learner, "features", lambda params, inputs: inputs["values"])
    params = learner.init_params()
    optimiser = torch.optim.Adam(params.values(), lr=0.003)
    unseen = [sign_task(seed) for seed in range(1000, 1020)]
    before = learner.meta_grad(params, unseen).accuracy / len(unseen)
    for step in range(60):
        part = learner.meta_grad(params, [sign_task(4 * step + k) for k in range(4)])
        for key, value in params.items():
            value.grad = part.grads[key]
        optimiser.step()
    after = learner.meta_grad(params, unseen).accuracy / len(unseen)
    assert before < 0.7 and after > 0.85, f"accuracy on unseen tasks went from {before} to {after}"
