from dataclasses import replace

import numpy as np
import pytest
import torch

from fewshot_nlp.data import EpisodeReader, EpisodeSampler, divide_classes, find_clusters
from tests.data.toy_data import make_pool

POOL = make_pool({"apple": 20, "banana": 30})


def number(text):
    return int(text.split()[-1])


def thirds(texts):
    """Points on a circle: three places, by the number in the text, and a little apart within them."""
    angles = np.array([2 * np.pi * (number(text) % 3) / 3 + 0.001 * number(text) for text in texts])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_clusters_are_those_of_the_features_and_of_one_class():
    found = find_clusters(POOL, thirds, 3)
    assert sorted(found) == [f"{name}/{i}" for name in ("apple", "banana") for i in range(3)]
    for name, rows in found.items():
        assert set(rows) <= set(POOL.rows_by_class[name.rpartition("/")[0]])
        assert list(rows) == sorted(rows)
        assert len({number(text) % 3 for text in POOL.texts(rows)}) == 1
    assert sorted(row for rows in found.values() for row in rows) == list(range(50))


def test_the_same_seed_gives_the_same_clusters():
    def points(texts):
        return np.random.default_rng(len(texts)).normal(size=(len(texts), 4))

    assert find_clusters(POOL, points, 5, seed=1) == find_clusters(POOL, points, 5, seed=1)
    assert find_clusters(POOL, points, 5, seed=1) != find_clusters(POOL, points, 5, seed=2)


def test_a_cluster_fills_an_episode_or_is_left_out():
    def one_apart(texts):
        return np.array([[100.0 if number(text) == 0 else number(text) * 1e-3, 0.0] for text in texts])

    found = find_clusters(POOL, one_apart, 2, min_examples=2)
    assert sorted(map(len, found.values())) == [19, 29]
    assert len(divide_classes(POOL, found)) == len(POOL) - 2


def test_a_class_too_small_to_divide_stays_whole():
    assert find_clusters(make_pool({"apple": 5}), thirds, 4, min_examples=3) == {"apple/0": tuple(range(5))}

    def all_alone(texts):
        return np.array([[100.0 ** min(number(text), 3)] for text in texts])

    # Four examples make two clusters of two on average, and 3 is far from the others.
    assert find_clusters(make_pool({"apple": 4}), all_alone, 4, min_examples=2) == {"apple/0": (0, 1, 2)}


def test_no_more_clusters_than_different_points():
    found = find_clusters(POOL, lambda texts: np.ones((len(texts), 2)), 4)
    assert found == {"apple/0": tuple(range(20)), "banana/0": tuple(range(20, 50))}


def test_episodes_of_clusters_are_at_addresses_of_their_own_and_told_the_names_of_the_classes(encoder):
    pool = replace(POOL, descriptions={"apple": "a fruit of a tree", "banana": "a fruit of a herb"})
    divided = divide_classes(pool, find_clusters(pool, thirds, 3))
    sampler = EpisodeSampler(divided, n_way=6, k_shot=1, n_query=2)
    reader = EpisodeReader([pool, divided], encoder, use_label_names=True)
    spec = sampler[0]
    assert spec.pool == "toy-6-clusters"
    assert len(set(spec.classes)) == 6
    names = reader(spec).support.names["input_ids"]
    expected = encoder.collate(encoder.encode_names([name.rpartition("/")[0] for name in spec.classes]))["input_ids"]
    torch.testing.assert_close(names[:, : expected.shape[1]], expected)
    assert {divided.descriptions[name] for name in spec.classes} == set(pool.descriptions.values())


@pytest.mark.parametrize(("settings", "said"), [({"n_clusters": 0}, "n_clusters=0"), ({"min_examples": 0}, "min_exam")])
def test_bad_numbers_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        find_clusters(POOL, thirds, **{"n_clusters": 2, **settings})
