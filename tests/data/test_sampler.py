import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewshot_nlp.data import EpisodeSampler
from fewshot_nlp.data.sampler import draw
from fewshot_nlp.types import EpisodeSpec
from tests.data.toy_data import CLASSES, make_pool

POOL = make_pool(dict(zip(CLASSES, range(11, 19), strict=True)))
OWNER = {row: name for name, rows in POOL.rows_by_class.items() for row in rows}


@st.composite
def samplers(draw_):
    n_way = draw_(st.integers(2, 7))
    max_n_way = draw_(st.none() | st.integers(n_way, 7))
    k_shot = draw_(st.integers(1, 5))
    max_k_shot = draw_(st.none() | st.integers(k_shot, 5))
    return EpisodeSampler(
        POOL,
        n_way=n_way,
        max_n_way=max_n_way,
        k_shot=k_shot,
        max_k_shot=max_k_shot,
        n_query=draw_(st.integers(1, 6)),
        n_out_of_scope=draw_(st.integers(0, 9)),
        seed=draw_(st.integers(-5, 2**40)),
    )


@given(samplers(), st.integers(0, 10**12))
def test_an_episode_is_what_was_asked_for(sampler, index):
    spec = sampler[index]
    assert (spec.pool, spec.split, spec.index) == ("toy", "train", index)
    assert sampler.n_way <= spec.n_way <= sampler.max_n_way
    assert len(set(spec.classes)) == spec.n_way == len(spec.support) == len(spec.query)
    shots = {len(rows) for rows in spec.support}
    assert len(shots) == 1
    assert sampler.k_shot <= shots.pop() <= sampler.max_k_shot
    assert {len(rows) for rows in spec.query} == {sampler.n_query}
    assert len(spec.out_of_scope) == sampler.n_out_of_scope
    for name, support, query in zip(spec.classes, spec.support, spec.query, strict=True):
        assert {OWNER[row] for row in support + query} == {name}
    assert not {OWNER[row] for row in spec.out_of_scope} & set(spec.classes)
    every = [row for rows in (*spec.support, *spec.query, spec.out_of_scope) for row in rows]
    assert len(set(every)) == len(every)
    hash(spec)


@given(samplers(), st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_an_episode_depends_on_its_address_alone(sampler, indices):
    expected = {index: sampler[index] for index in sorted(indices)}
    random.seed(sum(indices))  # A global generator must play no part.
    assert {index: sampler[index] for index in indices} == expected
    again = EpisodeSampler(POOL, **sampler.settings)
    assert again[indices[0]] == expected[indices[0]]


def test_seed_split_and_index_each_change_the_episode():
    settings = {"n_way": 4, "k_shot": 2, "n_query": 3}
    base = EpisodeSampler(POOL, **settings)
    other_seed = EpisodeSampler(POOL, **settings, seed=1)
    test = make_pool(dict(zip(CLASSES, range(11, 19), strict=True)), split="test")
    other_split = EpisodeSampler(test, **settings)
    contents = {(s.classes, s.support, s.query) for s in (base[0], base[1], other_seed[0], other_split[0])}
    assert len(contents) == 4


def test_an_episode_is_what_it_was():
    """Published results depend on it: a change of the rule must not pass unseen."""
    spec = EpisodeSampler(make_pool({"a": 4, "b": 4, "c": 4}), n_way=2, k_shot=1, n_query=2, n_out_of_scope=1)[3]
    assert spec == EpisodeSpec(
        split="train",
        index=3,
        pool="toy",
        classes=("a", "b"),
        support=((0,), (7,)),
        query=((2, 1), (6, 5)),
        out_of_scope=(9,),
    )


def test_way_and_shot_vary_over_their_whole_range():
    sampler = EpisodeSampler(POOL, n_way=2, max_n_way=5, k_shot=1, max_k_shot=4, n_query=1)
    seen = {(spec.n_way, len(spec.support[0])) for spec in islice(sampler, 400)}
    assert seen == {(n, k) for n in range(2, 6) for k in range(1, 5)}


def test_classes_rows_and_places_are_drawn_evenly():
    sampler = EpisodeSampler(POOL, n_way=2, k_shot=1, n_query=1, num_episodes=4000)
    first = [spec.classes[0] for spec in sampler]
    assert all(400 < first.count(name) < 600 for name in CLASSES)
    rows = [row for spec in sampler for name, (row,) in zip(spec.classes, spec.support, strict=True) if name == "apple"]
    assert all(rows.count(row) > len(rows) / 11 / 2 for row in POOL.rows_by_class["apple"])


def test_out_of_scope_queries_are_spread_over_classes():
    sampler = EpisodeSampler(POOL, n_way=5, k_shot=1, n_query=1, n_out_of_scope=7)
    for spec in islice(sampler, 20):
        owners = [OWNER[row] for row in spec.out_of_scope]
        assert sorted(owners.count(name) for name in set(owners)) == [2, 2, 3]


def test_draw_is_a_shuffle_that_stops_early():
    orders = {tuple(draw(random.Random(seed), "abc", 3)) for seed in range(100)}
    assert len(orders) == 6
    assert draw(random.Random(0), "abc", 0) == []


def test_a_sampler_with_an_end():
    sampler = EpisodeSampler(POOL, n_way=2, k_shot=1, n_query=1, num_episodes=3)
    assert len(sampler) == 3
    assert [spec.index for spec in sampler] == [0, 1, 2]
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"Episode {index} is outside the sequence of 3 episodes"):
            sampler[index]


def test_a_sampler_without_end():
    sampler = EpisodeSampler(POOL, n_way=2, k_shot=1, n_query=1)
    assert sampler
    assert [spec.index for spec in islice(sampler, 3)] == [0, 1, 2]
    with pytest.raises(TypeError, match="endless"):
        len(sampler)
    with pytest.raises(IndexError, match="Episode -1"):
        sampler[-1]
    assert sampler.pools == {"toy": POOL}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_way": 9}, r"The train pool of 'toy' has 8 classes, fewer than n_way=9\. Lower n_way"),
        ({"max_n_way": 9}, r"has 8 classes, fewer than max_n_way=9\. Lower max_n_way"),
        (
            {"k_shot": 10},
            r"has 2 classes with too few examples: 'apple' has 11, and 13 are needed \(k_shot=10 \+ n_query=3\)\. "
            r"Lower k_shot or n_query, or .*min_examples=13",
        ),
        ({"max_k_shot": 9}, r"'apple' has 11, and 12 are needed"),
        ({"n_way": 8, "n_out_of_scope": 1}, r"none is outside a 8-way episode for n_out_of_scope=1\. Lower n_way"),
        ({"n_way": 7, "n_out_of_scope": 12}, r"cannot give n_out_of_scope=12 queries: .*12 from one class.*has 11"),
        ({"n_way": 1}, r"n_way=1 is out of range\. Use a value of at least 2"),
        ({"max_n_way": 4}, r"max_n_way=4 is out of range\. Use a value of at least 5"),
        ({"k_shot": -1}, r"k_shot=-1 is out of range"),
        ({"max_k_shot": 0}, r"max_k_shot=0 is out of range"),
        ({"n_query": 0}, r"n_query=0 is out of range"),
        ({"n_out_of_scope": -1}, r"n_out_of_scope=-1 is out of range"),
        ({"num_episodes": 0}, r"num_episodes=0 is out of range"),
        ({"seed": 1.5}, r"seed=1\.5 must be of type int"),
        ({"n_way": "5"}, r"n_way='5' must be of type int"),
    ],
)
def test_what_a_pool_cannot_give_is_an_error_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(POOL, **{"n_way": 5, "k_shot": 1, "n_query": 3, **settings})


def test_the_limits_themselves_are_allowed():
    EpisodeSampler(POOL, n_way=8, k_shot=8, n_query=3)[0]
    EpisodeSampler(POOL, n_way=7, k_shot=1, n_query=1, n_out_of_scope=11)[0]
