"""Texts with numbers: a task is a group of them, and its labels are the numbers."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from fewshot_nlp.data import EpisodeReader, EpisodeSampler, TextEncoder, load_episodes, load_pools, save_episodes
from tests.tiny import WORDS, tiny_tokenizer

TOPICS = ("music", "light", "timer", "red", "blue", "warm")


def scored(**changes):
    rows = [(f"{topic} {word} {i}", topic, i + 0.25) for topic in TOPICS for i, word in enumerate(WORDS[:8])]
    columns = dict(zip(("text", "topic", "stars"), map(list, zip(*rows, strict=True)), strict=True))
    return Dataset.from_dict({**columns, **changes})


@pytest.fixture
def pools():
    return load_pools(scored(), label_column_name="topic", target_column_name="stars", name="reviews")


def test_a_task_is_one_group_and_its_labels_are_its_targets(pools):
    sampler = EpisodeSampler(pools["train"], n_way=1, k_shot=3, n_query=4)
    reader = EpisodeReader(pools, TextEncoder(tiny_tokenizer(), 16))
    for index in range(5):
        spec = sampler[index]
        (topic,), (support,), (query,) = spec.classes, spec.support, spec.query
        data = pools["train"].dataset
        assert all(text.startswith(topic) for text in pools["train"].texts([*support, *query]))
        # The second time the texts come from the cache.
        for _ in range(2):
            episode = reader(spec)
            assert episode.support.labels.tolist() == [data[row]["stars"] for row in support]
            assert episode.query.labels.tolist() == [data[row]["stars"] for row in query]
            assert episode.support.labels.dtype == torch.float32 and episode.support.n_way == episode.query.n_way == 1


def test_groups_are_in_one_split_each(pools):
    groups = [set(pool.label_names) for pool in pools.values()]
    assert set.union(*groups) == set(TOPICS) and sum(map(len, groups)) == len(TOPICS)


def test_other_targets_are_other_data(pools):
    stars = [row / 7 for row in range(len(TOPICS) * 8)]
    other = load_pools(scored(stars=stars), label_column_name="topic", target_column_name="stars", name="reviews")
    without = load_pools(scored(), label_column_name="topic", name="reviews")
    assert len({each["train"].fingerprint for each in (pools, other, without)}) == 3


def test_episodes_are_saved_and_replayed(pools, tmp_path):
    sampler = EpisodeSampler(pools["test"], n_way=1, k_shot=3, n_query=4, num_episodes=3)
    save_episodes(tmp_path / "episodes.jsonl", sampler)
    assert load_episodes(tmp_path / "episodes.jsonl", pools) == list(sampler)


def test_integers_are_numbers_too():
    stars = list(range(len(TOPICS) * 8))
    pools = load_pools(scored(stars=stars), label_column_name="topic", target_column_name="stars")
    rows = next(iter(pools["train"].rows_by_class.values()))
    assert pools["train"].targets(rows) == [float(row) for row in rows]


@pytest.mark.parametrize("settings", [{"n_way": 2}, {"n_way": 1, "n_out_of_scope": 1}])
def test_a_task_of_several_groups_is_refused(pools, settings):
    with pytest.raises(ValueError, match=r"which has targets, is one group of texts.*Use n_way=1"):
        EpisodeSampler(pools["train"], k_shot=1, n_query=1, **settings)


def test_one_way_without_targets_is_refused():
    pools = load_pools(scored(), label_column_name="topic")
    with pytest.raises(ValueError, match="n_way=1 is out of range"):
        EpisodeSampler(pools["train"], n_way=1, k_shot=1, n_query=1)


@pytest.mark.parametrize(
    ("column", "changes", "message"),
    [
        ("score", {}, r"target_column_name='score' is not a column. Use one of: text \(string\)"),
        ("text", {}, "target_column_name='text' does not hold numbers"),
        ("stars", {"stars": [None] + [1.0] * 47}, r"Row 0 has no target \(stars=None\)"),
        ("stars", {"stars": [1.0] * 47 + [math.nan]}, r"Row 47 has no target \(stars=nan\)"),
    ],
)
def test_bad_targets(column, changes, message):
    with pytest.raises(ValueError, match=message):
        load_pools(scored(**changes), label_column_name="topic", target_column_name=column)
