"""What must hold for any data set, sampler, settings and examples: the same 30 draws in every run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fewshot_nlp import FewShotClassifier
from fewshot_nlp.checks import from_mapping
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data import EpisodeMixture, EpisodeSampler, load_episodes, load_pools, save_episodes
from fewshot_nlp.data.config import EpisodeConfig
from fewshot_nlp.data.leakage import class_key, text_key
from fewshot_nlp.training import FewShotTrainingArguments
from tests.data.toy_data import make_pool

words = st.text(max_size=12)
few = settings(max_examples=15)


@given(st.lists(st.tuples(words, words), max_size=25), st.sampled_from(["error", "drop", "keep"]))
def test_a_data_set_becomes_pools_or_one_error(rows, duplicates):
    """Any texts and labels, empty ones and repeats among them."""
    data = Dataset.from_dict({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
    try:
        pools = load_pools(data, duplicates=duplicates, text_column_name="text", label_column_name="label")
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 2000
        return
    names = [class_key(name) for pool in pools.values() for name in pool.label_names]
    found = [row for pool in pools.values() for part in pool.rows_by_class.values() for row in part]
    assert len(set(found)) == len(found) and set(found) <= set(range(len(rows)))
    for pool in pools.values():
        for name, part in pool.rows_by_class.items():
            assert [rows[row][1] for row in part] == [name] * len(part)
            assert pool.texts(part) == [rows[row][0] for row in part]
    if duplicates != "keep":
        assert len(set(names)) == len(names)
        texts = [
            {text_key(rows[row][0]) for part in pool.rows_by_class.values() for row in part} for pool in pools.values()
        ]
        assert sum(map(len, texts)) == len(set().union(*texts))
    if duplicates == "drop":
        left_out = len(rows) - len(found)
        assert sum(pool.num_dropped for pool in pools.values()) == left_out


sizes = st.dictionaries(st.text(min_size=1, max_size=3), st.integers(2, 9), min_size=2, max_size=8)


@given(sizes, st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(0, 10**9))
def test_an_episode_is_what_was_asked_for(sizes, n_way, k_shot, n_query, n_out, index):
    pool = make_pool({name: sizes[name] for name in sorted(sizes)})
    shape = {"n_way": n_way, "k_shot": k_shot, "n_query": n_query, "n_out_of_scope": n_out}
    try:
        sampler = EpisodeSampler(pool, **shape, max_n_way=n_way + 1, max_k_shot=k_shot + 1)
    except ValueError as error:
        assert "Lower" in str(error)
        return
    spec = sampler[index]
    assert spec == sampler[index] == EpisodeSampler(pool, **shape, max_n_way=n_way + 1, max_k_shot=k_shot + 1)[index]
    assert hash(spec) == hash(sampler[index]) and spec.address == f"toy/train/{index}"
    assert n_way <= spec.n_way <= n_way + 1 and len(set(spec.classes)) == spec.n_way
    shots = {len(part) for part in spec.support}
    assert len(shots) == 1 and k_shot <= shots.pop() <= k_shot + 1
    assert {len(part) for part in spec.query} == {n_query} and len(spec.out_of_scope) == n_out
    every = [row for part in (*spec.support, *spec.query, spec.out_of_scope) for row in part]
    assert len(set(every)) == len(every), "a query is in a support set"
    for name, support, query in zip(spec.classes, spec.support, spec.query, strict=True):
        assert {*support, *query} <= set(pool.rows_by_class[name])
    own = {row for name in spec.classes for row in pool.rows_by_class[name]}
    assert own.isdisjoint(spec.out_of_scope)


@given(st.integers(0, 100), st.integers(0, 1000))
def test_no_class_of_the_test_is_in_training(split_seed, index):
    texts = [f"{name} {i}" for name in "abcdefghijkl" for i in range(3)]
    pools = load_pools(Dataset.from_dict({"text": texts, "label": [text[0] for text in texts]}), split_seed=split_seed)
    specs = {split: EpisodeSampler(pool, n_way=2, k_shot=1, n_query=2)[index] for split, pool in pools.items()}
    assert set(specs["train"].classes).isdisjoint(specs["validation"].classes + specs["test"].classes)
    assert set(specs["validation"].classes).isdisjoint(specs["test"].classes)


ASK = """
pool = make_pool({name: 6 for name in "abcdefgh"})
s = EpisodeSampler(pool, n_way=2, max_n_way=5, k_shot=1, max_k_shot=3, n_query=2, n_out_of_scope=3, seed=7)
m = EpisodeMixture([s, EpisodeSampler(pool, n_way=2, k_shot=1, n_query=1)], [3, 1], seed=5)
found = {i: (s[i], m[i]) for i in order}
"""


@pytest.mark.processes
def test_one_address_is_one_episode_in_any_process():
    """With another hash seed and in another order."""
    here: dict[str, Any] = {"EpisodeSampler": EpisodeSampler, "EpisodeMixture": EpisodeMixture, "make_pool": make_pool}
    here["order"] = range(40)
    exec(ASK, here)
    lines = ("from fewshot_nlp.data import *", "from tests.data.toy_data import make_pool", "order = range(39, -1, -1)")
    code = "\n".join([*lines, ASK, "print([found[i] for i in range(40)])"])
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "4242"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert there.strip() == str([here["found"][i] for i in range(40)])


@given(sizes, st.integers(1, 5), st.dictionaries(words, st.one_of(st.none(), st.integers(), words, st.booleans())))
@few
def test_an_episode_list_comes_back(tmp_path_factory, sizes, count, told):
    assume(min(sizes.values()) >= 3)
    pool = make_pool({name: sizes[name] for name in sorted(sizes)})
    specs = [EpisodeSampler(pool, n_way=2, k_shot=1, n_query=2)[i] for i in range(count)]
    path = tmp_path_factory.mktemp("lists") / "list.jsonl"
    save_episodes(path, specs, pool, settings=told)
    assert load_episodes(path, pool) == specs


def wrong(hint: Any) -> st.SearchStrategy:
    """Values that are of no type that ``hint`` allows."""
    said = str(hint)
    options: list[st.SearchStrategy] = [st.just(object), st.binary(max_size=3), st.just(3j), st.just((1, "a"))]
    if "None" not in said:
        options.append(st.none())
    if "str" not in said:
        options.append(words)
    if "dict" not in said:
        options.append(st.just({"a": 1}))
    if "list" not in said:
        options += [st.just([]), st.just(["a", 1]), st.just([[]])]
    if "int" not in said and "float" not in said:
        options += [st.integers(), st.floats()]
    if "bool" not in said and "list" not in said:
        options.append(st.booleans())
    return st.one_of(options)


CLASSES = (FewShotConfig, EpisodeConfig, FewShotTrainingArguments)
#: `resume_from_checkpoint: true` and one tracker's name are taken for what they stand for.
LENIENT = {"resume_from_checkpoint", "report_to"}
FIELDS = [(cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_every_setting_refuses_another_type_and_number(cls, name, tmp_path):
    hint = get_type_hints(cls)[name]
    needed = {"output_dir": str(tmp_path / "out")} if cls is FewShotTrainingArguments else {}

    @given(wrong(hint))
    @few
    def refuses(value):
        assume(name not in LENIENT or isinstance(value, bytes | complex | type(None)))
        with pytest.raises(ValueError, match=name) as caught:
            cls(**{**needed, name: value})
        assert len(str(caught.value)) < 1500

    refuses()
    numbers = (int, float) if hint is float else (int,)
    if hint in (int, float):
        for value in (-1, -(10**400), *([math.nan, math.inf, -0.5] if hint is float else [True, 1.5, "1"])):
            with pytest.raises(ValueError, match=name):
                cls(**{**needed, name: value})
        assert isinstance(getattr(cls(**needed), name), numbers)
    elif hint is str and name not in ("output_dir", "model_name_or_path", "dataset_name", "metric_for_best_model"):
        with pytest.raises(ValueError, match=f"{name}='no such'"):
            cls(**{**needed, name: "no such"})


@given(
    st.dictionaries(
        words,
        st.recursive(st.none() | words | st.integers() | st.floats(), lambda x: st.lists(x, max_size=2)),
        min_size=1,
    )
)
def test_unknown_settings_are_refused_by_name(mapping):
    assume(not any(key in {f.name for f in dataclasses.fields(FewShotConfig)} for key in mapping))
    with pytest.raises(ValueError, match="has an unknown key") as caught:
        from_mapping(FewShotConfig, mapping, "file")
    assert str(caught.value).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(FewShotConfig)]), json_values, max_size=4))
@settings(max_examples=150)
def test_json_makes_settings_or_one_error_and_settings_make_the_same_json(mapping):
    try:
        config = FewShotConfig.from_dict(json.loads(json.dumps(mapping)))
    except ValueError as error:
        assert str(error)
        return
    assert FewShotConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.fixture(scope="module")
def classifier(bert_folder):
    return FewShotClassifier(model_name_or_path=bert_folder, device="cpu").fit(["play", "stop"], ["a", "b"])


#: Halves of surrogate pairs among letters, which ``st.text`` leaves out.
halves = st.text("ab \ud800\udbff\udc00\udfff", min_size=1, max_size=6)
wild = st.one_of(words, halves)
anything = st.one_of(st.none(), st.integers(), st.floats(), st.booleans(), wild, st.binary(max_size=3))


@given(st.one_of(anything, st.lists(anything, max_size=4), st.just(np.zeros((2, 2))), st.sets(wild, max_size=2)),
       st.one_of(anything, st.lists(anything, max_size=4)))  # fmt: skip
@settings(max_examples=60)
def test_a_classifier_learns_or_refuses(classifier, X, y):
    fresh = FewShotClassifier(classifier._load(), device="cpu")
    try:
        fresh.fit(X, y)
    except ValueError as error:
        assert str(error)
        return
    assert list(fresh.classes_) == sorted(set(y)) and len(fresh.predict(list(X))) == len(X)


labels = st.one_of(
    st.lists(wild, min_size=4, max_size=4), st.lists(st.integers(-(2**70), 2**70), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.lists(st.sampled_from(["a", "a\0", "\0", "b ", "b", "\u00e9", "e\u0301"]), min_size=4, max_size=4),
    st.lists(st.sampled_from([2**63, 2**63 + 1, -1, 0, 2**53, 2**53 + 1]), min_size=4, max_size=4),
)  # fmt: skip


@given(labels)
@settings(max_examples=60)
def test_any_labels_come_back_as_they_were(classifier, y):
    assume(len(set(y)) > 1)
    fresh = FewShotClassifier(classifier._load(), device="cpu")
    fresh.fit(["play", "stop", "music", "red"], y)
    assert fresh.classes_.tolist() == sorted(set(y))
    assert set(fresh.predict(["play", "red"]).tolist()) <= set(y)


sound = st.text(min_size=1, max_size=6)


@given(st.one_of(st.lists(texts, min_size=1, max_size=6) for texts in (sound, st.one_of(sound, halves))))
def test_any_text_has_an_answer_or_an_error(classifier, texts):
    try:
        probabilities = classifier.predict_proba(texts)
    except ValueError as error:
        assert str(error)
        assert any(not text.strip() or not text.isprintable() for text in texts)
        return
    assert probabilities.shape == (len(texts), 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
