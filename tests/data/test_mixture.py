from collections import Counter
from itertools import islice

import pytest

from fewshot_nlp.data import EpisodeMixture, EpisodeSampler
from tests.data.toy_data import CLASSES, make_pool

FRUIT = make_pool(dict.fromkeys(CLASSES, 12), name="fruit")
LETTERS = make_pool(dict.fromkeys("abcdef", 20), name="letters")


def sampler(pool, **settings):
    return EpisodeSampler(pool, **{"n_way": 2, "k_shot": 1, "n_query": 2, **settings})


def test_an_episode_comes_whole_from_one_sampler():
    samplers = [sampler(FRUIT, n_way=5), sampler(LETTERS, k_shot=3)]
    mixture = EpisodeMixture(samplers, seed=2)
    assert mixture.pools == {"fruit": FRUIT, "letters": LETTERS}
    specs = list(islice(mixture, 50))
    assert {spec.pool for spec in specs} == {"fruit", "letters"}
    for index, spec in enumerate(specs):
        assert spec == samplers[spec.pool == "letters"][index]


def test_an_episode_depends_on_seed_and_index_alone():
    samplers = [sampler(FRUIT), sampler(LETTERS)]
    mixture = EpisodeMixture(samplers, seed=3)
    expected = [mixture[i] for i in range(40)]
    assert [mixture[i] for i in reversed(range(40))] == expected[::-1]
    assert [EpisodeMixture(samplers, seed=3)[i] for i in range(40)] == expected
    assert [EpisodeMixture(samplers, seed=4)[i] for i in range(40)] != expected


@pytest.mark.parametrize(("weights", "share"), [(None, 0.5), ([3, 1], 0.75), ([0.2, 0.6], 0.25), ([0, 5], 0)])
def test_samplers_are_drawn_by_weight(weights, share):
    mixture = EpisodeMixture([sampler(FRUIT), sampler(LETTERS)], weights)
    drawn = Counter(spec.pool for spec in islice(mixture, 2000))
    assert abs(drawn["fruit"] / 2000 - share) < 0.05
    assert drawn["fruit"] == 0 if share == 0 else drawn["fruit"]


def test_two_samplers_may_share_a_pool():
    mixture = EpisodeMixture([sampler(FRUIT), sampler(FRUIT, k_shot=5)])
    assert mixture.pools == {"fruit": FRUIT}
    assert {len(spec.support[0]) for spec in islice(mixture, 20)} == {1, 5}


def test_length():
    endless = EpisodeMixture([sampler(FRUIT), sampler(LETTERS)])
    assert endless
    with pytest.raises(TypeError, match="endless"):
        len(endless)
    shortest = EpisodeMixture([sampler(FRUIT, num_episodes=4), sampler(LETTERS, num_episodes=9)])
    assert len(shortest) == len(list(shortest)) == 4
    given = EpisodeMixture([sampler(FRUIT), sampler(LETTERS, num_episodes=9)], num_episodes=6)
    assert [spec.index for spec in given] == list(range(6))
    with pytest.raises(IndexError, match="Episode 6"):
        given[6]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EpisodeMixture([]), "one or more samplers"),
        (lambda: EpisodeMixture([sampler(FRUIT)], [1, 2]), "2 weights do not fit 1 samplers"),
        (lambda: EpisodeMixture([sampler(FRUIT)], [0]), "not all zero"),
        (lambda: EpisodeMixture([sampler(FRUIT)], [-1]), "not negative"),
        (lambda: EpisodeMixture([sampler(FRUIT)], [float("nan")]), "must be finite"),
        (lambda: EpisodeMixture([sampler(FRUIT)], seed=1.0), r"seed=1\.0 must be of type int"),
        (lambda: EpisodeMixture([sampler(FRUIT)], num_episodes=0), "num_episodes=0 is out of range"),
        (
            lambda: EpisodeMixture([sampler(FRUIT, num_episodes=3)], num_episodes=4),
            "num_episodes=4 is more than the 3 of a sampler",
        ),
        (
            lambda: EpisodeMixture([sampler(FRUIT), sampler(make_pool(dict.fromkeys("ab", 9), split="test"))]),
            "different splits: test, train",
        ),
        (
            lambda: EpisodeMixture([sampler(FRUIT), sampler(make_pool(dict.fromkeys("ab", 9), name="fruit"))]),
            r"Two different pools are called fruit/train\. Name them apart",
        ),
    ],
)
def test_bad_mixtures_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
