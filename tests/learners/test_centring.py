"""Features around their mean and whitened, against means and covariances taken by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import normalize

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data import EpisodeReader, EpisodeSampler, Pool
from fewshot_nlp.learners import build_learner
from fewshot_nlp.learners.centring import CENTRE, WHITENING, centred, prepared, whitening
from fewshot_nlp.models.heads import SCALE
from tests.data.toy_data import make_pool
from tests.tiny import WORDS, random_episode, tiny_config

EPISODE = random_episode([1, 3, 2])


def spoken(count, name="toy"):
    """A pool of one class, of texts that a tiny backbone can tell apart."""
    texts = [" ".join(words) for words in product(WORDS, repeat=2)][-count:]
    return Pool(name, "train", {"all": tuple(range(count))}, Dataset.from_dict({"text": texts}))


@pytest.fixture
def learner(bert_folder):
    return build_learner(tiny_config(bert_folder, learner="protonet", head="prototype", center_features=True))


def test_the_centre_is_the_mean_feature_of_training_examples(learner):
    pools = [spoken(12), spoken(3, "other")]
    start = learner.init_params()
    assert not start[CENTRE].any()
    found = centred(learner, start, pools)
    texts = [text for pool in pools for text in pool.examples(list(range(pool.dataset.num_rows)))]
    features = learner.model.features(start, learner.model.encoder()(texts)).detach()
    assert len(features) == 15
    torch.testing.assert_close(found[CENTRE], features.mean(dim=0))
    assert all(torch.equal(found[name], start[name]) for name in start if name != CENTRE)
    assert not start[CENTRE].any()


def test_few_of_many_examples_are_drawn_by_the_seed(learner, monkeypatch):
    monkeypatch.setattr("fewshot_nlp.learners.centring.EXAMPLES", 4)
    pools, start = [spoken(18)], learner.init_params()
    one, again, other = (centred(learner, start, pools, seed)[CENTRE] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


def test_prototypes_are_compared_around_the_centre(learner):
    params = centred(learner, learner.init_params(), [spoken(12)])
    support, query = EPISODE.support, EPISODE.query
    found = learner.predict(params, learner.adapt(params, support), query)
    examples, queries = (learner.model.features(params, b.inputs).detach() - params[CENTRE] for b in (support, query))
    means = torch.stack([examples[support.labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(found, params[SCALE].exp() * normalize(queries, dim=-1) @ normalize(means, dim=-1).T)


def test_without_a_centre_nothing_changes(bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="protonet", head="prototype"))
    start = learner.init_params()
    found = centred(learner, start, [spoken(5)])
    assert found.keys() == start.keys()
    assert all(torch.equal(found[name], start[name]) for name in start)


def test_names_may_be_given_in_training_alone(learner):
    pools = {split: make_pool({"cat": 5, "dog": 7}, split=split) for split in ("train", "validation", "test")}
    reader = EpisodeReader(pools, learner.model.encoder(), use_label_names=True, names_in_training_alone=True)
    sizes = {"n_way": 2, "k_shot": 1, "n_query": 1}
    told = {split: reader(EpisodeSampler(pool, **sizes)[0]).support.names for split, pool in pools.items()}
    assert told["train"]["input_ids"].shape[0] == 2
    assert told["validation"] is told["test"] is None


def test_names_that_are_never_read_may_be_numbers(learner):
    pools = {"train": make_pool({"cat": 5, "dog": 7}), "test": make_pool({"1": 5, "2": 7}, split="test")}
    EpisodeReader(pools, learner.model.encoder(), use_label_names=True, names_in_training_alone=True)
    with pytest.raises(ValueError, match="no words in its name"):
        EpisodeReader(pools, learner.model.encoder(), use_label_names=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "names_in_training_alone=True reads the names.*Set use_label_names"),
        ({"use_label_names": True, "head": "linear", "head_init": "names"}, "leaves nothing to read"),
        ({"use_label_names": True, "learn_label_name_weight": True}, "leaves nothing to read"),
        ({"use_label_names": True, "condition_on_names": True}, "leaves nothing to read"),
    ],
)
def test_what_needs_names_of_every_task_is_refused(bert_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(bert_folder, names_in_training_alone=True, **settings)


def test_of_unit_length_examples_and_names_count_alike_in_a_mean(bert_folder):
    config = tiny_config(
        bert_folder, learner="protonet", head="prototype", center_features=True, normalize_features=True,
        use_label_names=True, label_name_weight=3,
    )  # fmt: skip
    learner = build_learner(config)
    params = centred(learner, learner.init_params(), [spoken(12)])
    named = random_episode([1, 3, 2], names=True)
    found = learner.predict(params, learner.adapt(params, named.support), named.query)

    def unit(inputs):
        return normalize(learner.model.features(params, inputs).detach() - params[CENTRE], dim=-1)

    examples, names = unit(named.support.inputs), unit(named.support.names)
    sums = torch.stack([examples[named.support.labels == c].sum(0) for c in range(3)]) + 3 * names
    torch.testing.assert_close(found, params[SCALE].exp() * unit(named.query.inputs) @ normalize(sums, dim=-1).T)


def test_whitened_unit_features_vary_alike_within_classes_in_all_directions():
    rng = np.random.default_rng(0)
    mixing = np.diag([3.0, 1.0, 0.5, 0.2]) @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    classes = ["a"] * 30 + ["b"] * 50 + ["c"]
    means = {name: 2 * rng.normal(size=4) for name in "abc"}
    features = np.stack([means[name] + rng.normal(size=4) @ mixing for name in classes])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    within = np.concatenate([unit[:30] - unit[:30].mean(0), unit[30:80] - unit[30:80].mean(0), np.zeros((1, 4))])
    covariance = np.cov(within.T, bias=True)
    covariance /= np.trace(covariance) / 4
    for share in (0.05, 0.5, 0.999):
        found = whitening(torch.from_numpy(features), classes, share).numpy()
        np.testing.assert_allclose(found, found.T, rtol=0, atol=1e-12)
        # A is the inverse square root of the mixture: A (share C + (1 - share) I) A = I.
        np.testing.assert_allclose(
            found @ (share * covariance + (1 - share) * np.eye(4)) @ found, np.eye(4), rtol=0, atol=1e-10
        )
        assert (np.linalg.eigvalsh(found) > 0).all()


def test_features_are_whitened_around_the_centre(bert_folder):
    config = tiny_config(
        bert_folder, learner="protonet", head="prototype", center_features=True, whiten_features=0.5
    )  # fmt: skip
    learner = build_learner(config)
    start = learner.init_params()
    assert torch.equal(start[WHITENING], torch.eye(learner.model.hidden_size))
    pools = [spoken(12), spoken(3, "other")]
    params = centred(learner, start, pools)
    texts = [text for pool in pools for text in pool.examples(list(range(pool.dataset.num_rows)))]
    features = learner.model.features(start, learner.model.encoder()(texts)).detach().double()
    torch.testing.assert_close(params[CENTRE].double(), features.mean(dim=0))
    # The classes of two pools are two, whatever they are called.
    by_hand = whitening(features - features.mean(dim=0), ["one"] * 12 + ["two"] * 3, 0.5)
    torch.testing.assert_close(params[WHITENING].double(), by_hand, rtol=1e-4, atol=1e-4)

    def whitened(inputs):
        return normalize(learner.model.features(params, inputs).detach() - params[CENTRE], dim=-1) @ params[WHITENING]

    support, query = EPISODE.support, EPISODE.query
    found = learner.predict(params, learner.adapt(params, support), query)
    means = torch.stack([whitened(support.inputs)[support.labels == c].mean(0) for c in range(3)])
    cosines = normalize(whitened(query.inputs), dim=-1) @ normalize(means, dim=-1).T
    torch.testing.assert_close(found, params[SCALE].exp() * cosines)


def test_more_examples_are_behind_a_covariance_than_behind_a_mean(bert_folder, monkeypatch):
    monkeypatch.setattr("fewshot_nlp.learners.centring.EXAMPLES", 2)
    monkeypatch.setattr("fewshot_nlp.learners.centring.COVARIANCE_EXAMPLES", 18)
    settings = {"learner": "protonet", "head": "prototype", "center_features": True}
    few, many = (build_learner(tiny_config(bert_folder, whiten_features=w, **settings)) for w in (0.0, 0.1))
    pool = [spoken(18)]
    found = centred(many, many.init_params(), pool)[CENTRE]
    assert not torch.allclose(found, centred(few, few.init_params(), pool)[CENTRE])
    monkeypatch.setattr("fewshot_nlp.learners.centring.EXAMPLES", 18)
    torch.testing.assert_close(found, centred(few, few.init_params(), pool)[CENTRE])


@pytest.mark.parametrize("half", [False, True])
def test_any_matrix_is_multiplied_from_the_left_in_full_precision(half, bert_folder):
    config = tiny_config(bert_folder, learner="protonet", head="prototype", whiten_features=0.1)
    learner = build_learner(config)
    features = torch.randn(5, learner.model.hidden_size)
    matrix = torch.randn(learner.model.hidden_size, learner.model.hidden_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = prepared(config, {**learner.init_params(), WHITENING: matrix}, features)
    torch.testing.assert_close(found, torch.stack([matrix @ (one / one.norm()) for one in features]))


@pytest.mark.parametrize(
    "settings",
    [
        {"learner": "maml"},
        {"learner": "memory"},
        {"learner": "meta_transfer", "adapter": "none"},
        {"learner": "protonet", "use_label_names": True, "condition_on_names": True},
        {"learner": "anil", "task": "regression"},
    ],
)
def test_whitening_is_for_learners_that_learn_nothing_more_on_top(settings, bert_folder):
    with pytest.raises(ValueError, match=r"whiten_features=0\.1 is found anew"):
        build_learner(tiny_config(bert_folder, whiten_features=0.1, **settings))


def test_examples_that_do_not_differ_say_nothing_of_directions(bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="protonet", head="prototype", whiten_features=0.1))
    alike = Pool("toy", "train", {"a": (0, 1), "b": (2,)}, Dataset.from_dict({"text": ["book", "book", "play"]}))
    with pytest.raises(ValueError, match="no class here has two examples that differ: 3 examples of 2 classes"):
        centred(learner, learner.init_params(), [alike])


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
def test_a_share_that_leaves_nothing_of_the_identity_is_refused(share):
    with pytest.raises(ValueError, match=r"whiten_features=.*Use a share from 0 to less than 1"):
        FewShotConfig(whiten_features=share)


@pytest.mark.parametrize("setting", [{"center_features": True}, {"whiten_features": 0.1}, {"normalize_features": True}])
def test_scores_of_names_are_no_features(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} changes features"):
        FewShotConfig(head="verbalizer", **setting)
