"""What results are shown beside: against scikit-learn, numpy and torch's own optimiser."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize

from fewshot_nlp.learners import FineTuning, FrozenPrototypes, LogisticRegression, build_learner
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.cache import FrozenFeatures
from tests.tiny import random_episode, tiny_config

COUNTS = [2, 1, 4]


@pytest.fixture(scope="module")
def model(bert_folder):
    return FewShotModel.build(tiny_config(bert_folder))


@pytest.fixture
def features(model):
    return FrozenFeatures(model)


@pytest.fixture
def episode():
    return random_episode(COUNTS, n_query=5)


def unit(model, batch):
    return normalize(model.frozen_features(batch.inputs), dim=1).numpy().astype(np.float64)


def test_prototypes_by_hand(model, features, episode):
    learner = FrozenPrototypes(features)
    logits = learner.predict({}, learner.adapt({}, episode.support), episode.query).numpy()
    support, labels = unit(model, episode.support), episode.support.labels.numpy()
    means = np.stack([support[labels == c].mean(0) for c in range(3)])
    cosine = unit(model, episode.query) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    np.testing.assert_allclose(logits, 10 * cosine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [FrozenPrototypes, LogisticRegression])
def test_mixed_precision_ends_before_the_baseline(features, episode, kind):
    learner = kind(features)

    def logits():
        return learner.predict({}, learner.adapt({}, episode.support), episode.query)

    expected = logits()  # Features are kept from here on.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(), expected)


def test_one_example_a_class_is_scikit_learns_nearest_neighbour(model, features):
    episode = random_episode([1, 1, 1], n_query=5)
    learner = FrozenPrototypes(features)
    answers = learner.predict({}, learner.adapt({}, episode.support), episode.query).argmax(1)
    nearest = KNeighborsClassifier(1).fit(unit(model, episode.support), episode.support.labels.numpy())
    assert answers.tolist() == nearest.predict(unit(model, episode.query)).tolist()


@pytest.mark.parametrize("counts", [COUNTS, [2, 3]], ids=["three classes", "two classes"])
def test_logistic_regression_is_scikit_learns(model, features, counts):
    episode = random_episode(counts, n_query=5)
    learner = LogisticRegression(features)
    found = learner.predict({}, learner.adapt({}, episode.support), episode.query)
    plain = SklearnLogisticRegression(C=10.0, max_iter=1000)
    plain.fit(unit(model, episode.support), episode.support.labels.numpy())
    assert found.shape == (5 * len(counts), len(counts))
    np.testing.assert_allclose(found.exp(), plain.predict_proba(unit(model, episode.query)), atol=1e-3)


@pytest.mark.parametrize("kind", [FrozenPrototypes, LogisticRegression])
def test_there_is_nothing_to_train(features, episode, kind):
    learner = kind(features)
    assert learner.init_params() == {}
    assert not learner.transductive
    with pytest.raises(TypeError, match=f"{kind.__name__} has no meta-parameters to train. Evaluate it as it is"):
        learner.meta_grad({}, [episode])


def test_baselines_share_what_was_computed(model, episode, monkeypatch):
    calls = []
    plain = model.frozen_features
    monkeypatch.setattr(
        model, "frozen_features", lambda inputs: calls.append(len(inputs["input_ids"])) or plain(inputs)
    )
    features = FrozenFeatures(model)
    for kind in (FrozenPrototypes, LogisticRegression):
        learner = kind(features)
        learner.predict({}, learner.adapt({}, episode.support), episode.query)
    assert calls == [len(episode.support), len(episode.query)]


@pytest.mark.parametrize("learner", ["maml", "reptile", "protonet"])
def test_fine_tuning_is_torchs_adam(bert_folder, episode, learner):
    """From the adapter's untrained start, whatever is meta-trained beside it."""
    meta = build_learner(tiny_config(bert_folder, learner=learner, head="prototype"))
    meta.model.module.double()
    tuning = FineTuning.like(meta, steps=4, learning_rate=0.02, head_init="zero")
    params = {name: value.double() for name, value in tuning.init_params().items()}
    found = tuning.predict(params, tuning.adapt(params, episode.support), episode.query)

    body = {name: value.clone().requires_grad_() for name, value in params.items() if name.startswith("model.")}
    weight, bias = torch.zeros(3, 16, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    weight.requires_grad_(), bias.requires_grad_()
    optimiser = torch.optim.Adam([{"params": [*body.values()], "lr": 0.02}, {"params": [weight, bias], "lr": 0.01}])

    def logits(batch):
        names = {name.removeprefix("model."): value for name, value in body.items()}
        hidden = functional_call(meta.model.module, names, kwargs=batch.inputs).last_hidden_state
        mask = batch.inputs["attention_mask"][..., None]
        pooled = normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        return params["head.log_scale"].exp() * (pooled @ weight.T + bias)

    for _ in range(4):
        optimiser.zero_grad()
        cross_entropy(logits(episode.support), episode.support.labels).backward()
        optimiser.step()
    torch.testing.assert_close(found, logits(episode.query).detach(), rtol=1e-4, atol=1e-5)


def test_fine_tuning_starts_untrained(bert_folder):
    settings = {
        "learner": "maml",
        "head_init": "zero",
        "estimator": "exact",
        "inner_max_grad_norm": 0.1,
        "proximal": 0.5,
    }
    meta = build_learner(tiny_config(bert_folder, **settings))
    tuning = FineTuning.like(meta)
    assert tuning.model is meta.model
    assert (tuning.config.head, tuning.config.head_init, tuning.config.inner_rule) == ("linear", "prototype", "adam")
    assert tuning.config.inner_max_grad_norm is None
    assert tuning.config.proximal == 0
    assert meta.config.head_init == "zero"
    assert tuning.settings == {
        "inner_rule": "adam", "inner_steps": 10, "inner_learning_rate": 1e-3, "head_learning_rate": 0.01,
        "head_init": "prototype",
    }  # fmt: skip
    start = meta.model.init_params()
    assert all(torch.equal(value, start[name]) for name, value in tuning.init_params().items() if name in start)


def test_fine_tuning_needs_an_adapter(bert_folder):
    meta = build_learner(tiny_config(bert_folder, learner="protonet", adapter="none"))
    with pytest.raises(ValueError, match="adapter='none' has none"):
        FineTuning.like(meta)
