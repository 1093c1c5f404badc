"""What the names of classes do, against equations written out and limiting cases."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.learners import build_learner, metadata
from fewshot_nlp.models.heads import NAME_WEIGHT, SCALE
from tests.tiny import random_episode, tiny_config

COUNTS = [1, 3, 2]
EPISODE = random_episode(COUNTS, names=True)
SUPPORT, QUERY = EPISODE.support, EPISODE.query


def double(folder, **settings):
    """A learner that reads names, in float64, and its parameters away from LoRA's zero."""
    learner = build_learner(tiny_config(folder, use_label_names=True, **settings))
    learner.model.module.double()
    rng = torch.Generator().manual_seed(0)
    params = {
        name: value.double() + 0.1 * torch.randn(value.shape, generator=rng, dtype=torch.float64)
        if name.startswith("model.")
        else value.double()
        for name, value in learner.init_params().items()
    }
    return learner, params


def answer(learner, params, support=SUPPORT):
    return learner.predict(params, learner.adapt(params, support), QUERY).detach()


def features(learner, params):
    """Of the examples, the names and the queries."""
    return [learner.model.features(params, inputs).detach() for inputs in (SUPPORT.inputs, SUPPORT.names, QUERY.inputs)]


@pytest.mark.parametrize("head", ["prototype", "linear"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_name_counts_for_so_many_examples(bert_folder, head, distance):
    """At its start a learned weight is that of the setting, and both are the mean written out."""
    settings = {"learner": "protonet", "head": head, "distance": distance, "label_name_weight": 3}
    learner, params = double(bert_folder, learn_label_name_weight=True, **settings)
    counted, plain = double(bert_folder, **settings)
    assert params.keys() - plain.keys() == {NAME_WEIGHT}
    found = answer(learner, params)
    torch.testing.assert_close(found, answer(counted, {name: params[name] for name in plain}))

    examples, names, queries = features(learner, params)
    centres = torch.stack([
        (examples[SUPPORT.labels == c].sum(0) + 3 * names[c]) / (count + 3) for c, count in enumerate(COUNTS)
    ])  # fmt: skip
    if distance == "cosine":
        expected = normalize(queries, dim=-1) @ normalize(centres, dim=-1).T
    else:
        expected = -torch.cdist(queries, centres).square()
    # Up to what is the same for every class.
    torch.testing.assert_close(found.softmax(-1), (params[SCALE].exp() * expected).softmax(-1))


def test_a_weight_of_nothing_and_of_everything(bert_folder):
    learner, params = double(bert_folder, learner="protonet", head="prototype", learn_label_name_weight=True)
    examples, names, queries = features(learner, params)
    ignored, alone = (answer(learner, {**params, NAME_WEIGHT: torch.tensor(w).double()}) for w in (-40.0, 40.0))
    means = torch.stack([examples[SUPPORT.labels == c].mean(0) for c in range(3)])
    for found, centres in ((ignored, means), (alone, names)):
        expected = params[SCALE].exp() * normalize(queries, dim=-1) @ normalize(centres, dim=-1).T
        torch.testing.assert_close(found, expected)


def test_the_weight_is_learned(bert_folder):
    """Its meta-gradient asks for less of names that mislead."""
    learner, params = double(bert_folder, learner="protonet", head="prototype", learn_label_name_weight=True)
    own = replace(EPISODE, query=replace(SUPPORT, names=None))
    names = {name: rows[[1, 2, 0]] for name, rows in _examples_of_each(SUPPORT).items()}
    misled = replace(own, support=replace(SUPPORT, names=names))
    assert learner.meta_grad(params, [misled]).grads[NAME_WEIGHT] > 0


def _examples_of_each(support):
    """One example of each class, to be its name."""
    first = [support.labels.tolist().index(c) for c in range(support.n_way)]
    return {name: rows[first] for name, rows in support.inputs.items()}


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_head_that_starts_at_the_names(bert_folder, distance):
    """Before the first step it is nearest name; after one, that plus the step written out."""
    settings = {"learner": "anil", "head_init": "names", "distance": distance, "inner_learning_rate": 0.3}
    learner, params = double(bert_folder, inner_steps=0, **settings)
    examples, names, queries = features(learner, params)
    scale = params[SCALE].exp()
    if distance == "cosine":
        examples, names, queries = (normalize(each, dim=-1) for each in (examples, names, queries))
        weight, bias = names.clone(), torch.zeros(3).double()
    else:
        weight, bias = 2 * names, -names.square().sum(-1)
    torch.testing.assert_close(answer(learner, params), scale * (queries @ weight.T + bias))

    learner, params = double(bert_folder, inner_steps=1, **settings)
    weight.requires_grad_(), bias.requires_grad_()
    rows, labels = torch.cat([examples, names]), torch.cat([SUPPORT.labels, torch.arange(3)])
    loss = cross_entropy(scale * (rows @ weight.T + bias), labels)
    slopes = torch.autograd.grad(loss, [weight, bias])
    expected = scale * (queries @ (weight - 0.3 * slopes[0]).T + bias - 0.3 * slopes[1])
    torch.testing.assert_close(answer(learner, params), expected.detach())


@pytest.mark.parametrize("learner", ["protonet", "maml", "fomaml"])
def test_conditioning_starts_as_nothing(bert_folder, learner):
    """The untrained learner is the one without."""
    settings = {"learner": learner, "head": "prototype" if learner == "protonet" else "linear"}
    told, params = double(bert_folder, condition_on_names=True, **settings)
    plain, _ = double(bert_folder, **settings)
    assert all(not value.any() for name, value in params.items() if name.startswith("film."))
    without = {name: value for name, value in params.items() if not name.startswith("film.")}
    torch.testing.assert_close(answer(told, params), answer(plain, without), rtol=0, atol=1e-12)


def conditioned(params, seed=3):
    rng = torch.Generator().manual_seed(seed)
    return {
        name: 0.1 * torch.randn(value.shape, generator=rng, dtype=torch.float64) if name.startswith("film.") else value
        for name, value in params.items()
    }


def test_the_description_scales_and_shifts_features(bert_folder):
    learner, params = double(bert_folder, learner="protonet", head="prototype", condition_on_names=True)
    params = conditioned(params)
    examples, names, queries = features(learner, params)
    d = normalize(names, dim=-1).mean(0)
    scale = 1 + params["film.scale"] + params["film.scale_by_names"] @ d
    shift = params["film.shift"] + params["film.shift_by_names"] @ d
    rows, labels = torch.cat([examples, names]) * scale + shift, torch.cat([SUPPORT.labels, torch.arange(3)])
    centres = torch.stack([rows[labels == c].mean(0) for c in range(3)])
    expected = params[SCALE].exp() * normalize(queries * scale + shift, dim=-1) @ normalize(centres, dim=-1).T
    torch.testing.assert_close(answer(learner, params), expected)


def test_a_description_is_of_the_task_and_not_of_an_order(bert_folder):
    """Names that change places leave scale and shift as they are; other names do not."""
    learner, params = double(bert_folder, learner="maml", condition_on_names=True)
    params = conditioned(params)

    def scale(names):
        return learner.adapt(params, replace(SUPPORT, names=names))[metadata.SCALE]

    turned = {name: rows[[2, 0, 1]] for name, rows in SUPPORT.names.items()}
    other = random_episode(COUNTS, seed=1, names=True).support.names
    torch.testing.assert_close(scale(turned), scale(SUPPORT.names))
    assert (scale(other) - scale(SUPPORT.names)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["condition_on_names", "learn_label_name_weight"])
def test_reptile_refuses_what_no_inner_step_changes(bert_folder, name):
    with pytest.raises(ValueError, match=f"'reptile' cannot train {name}.*Leave it out, or use estimator='exact'"):
        double(bert_folder, learner="reptile", **{name: True})


@pytest.mark.parametrize(
    "settings", [{"condition_on_names": True}, {"head_init": "names"}, {"learn_label_name_weight": True}]
)
def test_a_support_set_without_names_is_refused(bert_folder, settings):
    learner, params = double(bert_folder, learner="anil", **settings)
    nameless = replace(EPISODE, support=replace(SUPPORT, names=None))
    for call in (lambda: learner.adapt(params, nameless.support), lambda: learner.meta_grad(params, [nameless])):
        with pytest.raises(ValueError, match=r"without the names of its classes.*use_label_names=True"):
            call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_init": "names"}, "head_init='names' reads the names.*Set use_label_names"),
        ({"learn_label_name_weight": True}, "learn_label_name_weight=True reads the names"),
        ({"condition_on_names": True}, "condition_on_names=True reads the names"),
        ({"label_texts": "description"}, "label_texts='description' reads the names"),
        ({"use_label_names": True, "label_texts": "essay"}, "label_texts='essay' is not known"),
        ({"use_label_names": True, "head_init": "names", "head": "prototype"}, "would read the names alone"),
        (
            {"use_label_names": True, "learn_label_name_weight": True, "head_init": "zero"},
            "head_init='zero' has none. Use head_init='prototype'",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        FewShotConfig(**settings)


@pytest.mark.parametrize("learner", ["matching", "snail", "leo", "hyper"])
def test_a_learner_that_starts_in_its_own_way_has_no_use_for_names_in_the_head(bert_folder, learner):
    with pytest.raises(ValueError, match=f"learner='{learner}' starts in its own way. Leave them out"):
        double(bert_folder, learner=learner, learn_label_name_weight=True)


@pytest.mark.parametrize("learner", ["hyper", "memory"])
def test_a_learner_that_reads_names_is_not_told_them_twice(bert_folder, learner):
    with pytest.raises(ValueError, match=f"would tell learner='{learner}' what it reads itself"):
        double(bert_folder, learner=learner, condition_on_names=True)


def test_a_start_is_told_in_full_precision():
    names, rng = torch.randn(3, 8), torch.Generator().manual_seed(0)
    params = {name: torch.randn(v.shape, generator=rng) for name, v in metadata.init_params(8).items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = metadata.start(params, names)
    expected = metadata.start(params, names)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
